#!lua
-- Let some keys of a thread only decrypt from now on, ahead of the thread's next DEK.
-- KEYS  1 record of that DEK  2 the slot's control hash
-- ARGV  1 its KEK version  2 ms on this server's clock before the notices  3 most ms since then
--       4 start of a record's key  5 now, seconds  6... key_ids that were noticed
-- Returns 'ok' | 'late' | 'settled': that DEK is there already, or must be wrapped anew first
if redis.call('EXISTS', KEYS[1]) == 1
  or tonumber(ARGV[1]) < tonumber(redis.call('HGET', KEYS[2], 'floor') or '0') then
  return 'settled'
end
local time = redis.call('TIME')
local age = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[2]
if age < 0 or age > tonumber(ARGV[3]) then
  return 'late'
end
for n = 6, #ARGV do
  if redis.call('HGET', ARGV[4] .. ARGV[n], 'state') == 'enabled' then
    redis.call('HSET', ARGV[4] .. ARGV[n], 'state', 'decrypt_only', 'changed_at', ARGV[5])
  end
end
redis.call('HINCRBY', KEYS[2], 'touched', 1)
return 'ok'
