#!lua
-- Replace blobs by the same DEKs wrapped anew, where they still are the ones that were read.
-- KEYS  1 the slot's control hash  2 census of the new KEK version
-- ARGV  1 token  2 manifest's field  3 kek_id  4 kek_version  5 start of a record's key  6 start of a census's key
--       7 start of a bucket's key  8 of each: key_id, old blob, new blob, with four bytes of length before them
-- Returns {'ok', a letter each: d done, c changed, g gone} | {'fenced'} | {'stale'} | {'unbegun'}
local ctl = redis.call('HMGET', KEYS[1], 'fence', 'floor', ARGV[2])
if ctl[1] ~= ARGV[1] then
  return {'fenced'}
end
if tonumber(ARGV[4]) < tonumber(ctl[2] or '0') then
  return {'stale'}
end
if not ctl[3] then
  return {'unbegun'}
end
local buckets = tonumber(string.match(ctl[3], '^%d+'))
local data, at, added = ARGV[8], 1, 0
local results, moved, left = {}, {}, {}
while at <= #data do
  local id, old, new
  id, old, new, at = struct.unpack('>I4c0I4c0I4c0', data, at)
  local found = redis.call('HMGET', ARGV[5] .. id, 'wrapped', 'kek_version')
  local result = 'c'
  if not found[1] then
    result = 'g'
  elseif found[1] == new then
    -- A retry of a call whose answer was lost.
    result = 'd'
  elseif found[1] == old then
    local bucket = (tonumber(string.sub(id, -4), 36) or 0) % buckets
    added = added + redis.call('HSETNX', ARGV[7] .. bucket, id, old)
    redis.call('HSET', ARGV[5] .. id, 'wrapped', new, 'kek_id', ARGV[3], 'kek_version', ARGV[4])
    moved[#moved + 1] = id
    local version = found[2] or ''
    local census = left[version] or {}
    census[#census + 1] = id
    left[version] = census
    result = 'd'
  end
  results[#results + 1] = result
end
for version, ids in pairs(left) do
  redis.call('SREM', ARGV[6] .. version, unpack(ids))
end
if #moved > 0 then
  redis.call('SADD', KEYS[2], unpack(moved))
end
if added > 0 then
  -- What was sealed before is no longer what it was.
  redis.call('HSET', KEYS[1], ARGV[2], buckets .. ' -1')
else
  redis.call('HSET', KEYS[1], ARGV[2], ctl[3])
end
return {'ok', table.concat(results)}
