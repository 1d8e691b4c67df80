#!lua
-- Copy some records of a slot under one KEK version into a snapshot, never over an existing copy.
-- KEYS  1 the slot's control hash  2 census of the version
-- ARGV  1 token  2 manifest's field  3 cursor  4 how many  5 start of a record's key  6 start of a bucket's key
-- Returns {'ok', cursor} | {'fenced'} | {'unbegun'}
local ctl = redis.call('HMGET', KEYS[1], 'fence', ARGV[2])
if ctl[1] ~= ARGV[1] then
  return {'fenced'}
end
if not ctl[2] then
  return {'unbegun'}
end
local buckets = tonumber(string.match(ctl[2], '^%d+'))
local step = redis.call('SSCAN', KEYS[2], ARGV[3], 'COUNT', ARGV[4])
local added = 0
for _, id in ipairs(step[2]) do
  local blob = redis.call('HGET', ARGV[5] .. id, 'wrapped')
  if blob then
    local bucket = (tonumber(string.sub(id, -4), 36) or 0) % buckets
    added = added + redis.call('HSETNX', ARGV[6] .. bucket, id, blob)
  end
end
if added > 0 then
  -- What was sealed before is no longer what it was.
  redis.call('HSET', KEYS[1], ARGV[2], buckets .. ' -1')
else
  redis.call('HSET', KEYS[1], ARGV[2], ctl[2])
end
return {'ok', step[1]}
