#!lua
-- Go on holding the lock of rotations. One that ran out but that nobody took is still the holder's.
-- KEYS  1 lock      ARGV  1 token  2 lease, ms
-- Returns 'ok' | 'fenced'
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
  return 'fenced'
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'until', string.format('%.0f', now + ARGV[2]))
return 'ok'
