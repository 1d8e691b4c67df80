#!lua
-- Raise the least KEK version that may be written to a slot.
-- KEYS  1 the slot's control hash      ARGV  1 KEK version
local floor = math.max(tonumber(ARGV[1]), tonumber(redis.call('HGET', KEYS[1], 'floor') or '0'))
redis.call('HSET', KEYS[1], 'floor', floor)
return floor
