#!lua
-- Replace a blob by the same DEK wrapped anew, if it still is the one that was read.
-- KEYS  1 record  2 census of the old KEK version  3 census of the new one  4 the slot's control hash
-- ARGV  1 key_id  2 old blob  3 new blob  4 kek_id  5 kek_version
-- Returns {'ok'} | {'other'} | {'stale', floor} | {'destroyed'} | {'missing'}
local found = redis.call('HMGET', KEYS[1], 'state', 'wrapped')
if not found[1] then
  return {'missing'}
end
if found[1] == 'destroyed' then
  return {'destroyed'}
end
local floor = tonumber(redis.call('HGET', KEYS[4], 'floor') or '0')
if tonumber(ARGV[5]) < floor then
  return {'stale', floor}
end
-- A record that has lost its blob reads as one with an empty one, and may be restored.
local blob = found[2] or ''
-- Our own new blob: a retry of a call whose answer was lost.
if blob ~= ARGV[2] and blob ~= ARGV[3] then
  return {'other'}
end
redis.call('HSET', KEYS[1], 'wrapped', ARGV[3], 'kek_id', ARGV[4], 'kek_version', ARGV[5])
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
return {'ok'}
