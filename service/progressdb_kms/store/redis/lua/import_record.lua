#!lua
-- Add a record from an export with its indexes, unless there is one.
-- KEYS  1 record  2 the thread's index  3 census of the KEK version  4 the slot's control hash
--       5 destructions that fall due
-- ARGV  1 key_id  2 thread_id  3 version, '' where the thread's index lies in another slot  4 state
--       5 destroy_at or ''  6... names and values of the record's fields
-- Returns 'added' | 'present' | 'destroyed' | 'alive' | 'collision'
-- Whoever repeats an import is told of what is there as durable, so write.
redis.call('HINCRBY', KEYS[4], 'touched', 1)
local found = redis.call('HMGET', KEYS[1], 'thread_id', 'state')
if found[1] then
  if found[1] ~= ARGV[2] then
    return 'collision'
  end
  if found[2] == 'destroyed' then
    return ARGV[4] == 'destroyed' and 'present' or 'destroyed'
  end
  return ARGV[4] == 'destroyed' and 'alive' or 'present'
end
redis.call('HSET', KEYS[1], unpack(ARGV, 6))
if ARGV[3] ~= '' then
  redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
end
if ARGV[4] ~= 'destroyed' then
  redis.call('SADD', KEYS[3], ARGV[1])
end
if ARGV[5] ~= '' then
  redis.call('ZADD', KEYS[5], ARGV[5], ARGV[1])
end
return 'added'
