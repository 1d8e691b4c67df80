#!lua flags=no-writes
-- Read what the store vouches for of the audit log, as of one moment.
-- KEYS  1 heads  2 stream  3 roster  4 floors
-- Returns {roster, heads, floors, number of records, id of the last record ever}
local length, last = 0, '0-0'
if redis.call('EXISTS', KEYS[2]) == 1 then
  local info = redis.call('XINFO', 'STREAM', KEYS[2])
  for i = 1, #info, 2 do
    if info[i] == 'length' then
      length = info[i + 1]
    elseif info[i] == 'last-generated-id' then
      last = info[i + 1]
    end
  end
end
local roster = redis.call('GET', KEYS[3]) or ''
return {roster, redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[4]), length, last}
