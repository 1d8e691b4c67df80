#!lua
-- Make the registry of KEKs, unless there is one.
-- KEYS  1 schema  2 KEKs  3 mark of an import
-- ARGV  1 schema version  2 store_id  3 created_at  4 KEK version  5 its entry
-- Returns 1 if it was made, 0 if it was there, 2 if the store is being filled from a file
if redis.call('EXISTS', KEYS[1], KEYS[2]) > 0 then
  -- Whoever finds it is told of it as durable, so write.
  redis.call('HINCRBY', KEYS[1], 'touched', 1)
  return 0
end
if redis.call('EXISTS', KEYS[3]) > 0 then
  -- The import brings the registry, with the id of the store that it comes from.
  return 2
end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'store_id', ARGV[2], 'created_at', ARGV[3])
redis.call('HSET', KEYS[2], 'active', ARGV[4], 'rev', 1, ARGV[4], ARGV[5])
return 1
