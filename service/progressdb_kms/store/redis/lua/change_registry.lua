#!lua
-- Change the registry of KEKs if it still is the one that was read.
-- KEYS  1 KEKs  2 lock of rotations
-- ARGV  1 revision that was read  2 token of the lock, '' where none is needed  3 active version  4... version, entry
-- Returns 'ok' | 'fenced' | 'moved'
if ARGV[2] ~= '' and redis.call('HGET', KEYS[2], 'token') ~= ARGV[2] then
  return 'fenced'
end
if redis.call('HGET', KEYS[1], 'rev') ~= ARGV[1] then
  return 'moved'
end
-- Also with nothing to change: whoever repeats a change is told of it as durable, so write.
redis.call('HSET', KEYS[1], 'active', ARGV[3])
if #ARGV > 3 then
  redis.call('HSET', KEYS[1], unpack(ARGV, 4))
  redis.call('HINCRBY', KEYS[1], 'rev', 1)
end
return 'ok'
