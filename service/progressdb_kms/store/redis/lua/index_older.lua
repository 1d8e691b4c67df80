#!lua
-- Put a key of the older form into its thread's index, whose slot is not the key's, and give it a version.
-- KEYS  1 the thread's index  2 the slot's control hash
-- ARGV  1 key_id  2 its version, '' for the next one
-- Returns the version that it has in the index
redis.call('HINCRBY', KEYS[2], 'touched', 1)
-- Adds nothing: the way to a score that needs no further command in the store's ACL.
local known = redis.call('ZADD', KEYS[1], 'XX', 'INCR', 0, ARGV[1])
if known then
  return tonumber(known)
end
local version = tonumber(ARGV[2])
if not version then
  local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
  version = tonumber(last[2] or '0') + 1
end
redis.call('ZADD', KEYS[1], version, ARGV[1])
return version
