#!lua
-- Set the least KEK version that may be written to a slot.
-- KEYS  1 the slot's control hash      ARGV  1 token  2 KEK version  3 '1' to set it even below what it is
-- Returns 'ok' | 'fenced'
local ctl = redis.call('HMGET', KEYS[1], 'fence', 'floor')
if ctl[1] ~= ARGV[1] then
  return 'fenced'
end
local floor = tonumber(ARGV[2])
if ARGV[3] ~= '1' then
  floor = math.max(floor, tonumber(ctl[2] or '0'))
end
redis.call('HSET', KEYS[1], 'floor', floor)
return 'ok'
