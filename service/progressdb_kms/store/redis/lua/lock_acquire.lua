#!lua
-- Take the lock of rotations, if it is free, has run out, or is the asker's own.
-- KEYS  1 lock  2 counter of tokens
-- ARGV  1 owner  2 lease, ms
-- Returns {'ok', token} | {'held', owner, ms for which it has been held}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lock = redis.call('HMGET', KEYS[1], 'owner', 'until', 'since')
-- The owner itself asks again where an answer was lost; the new token fences whoever held the old one.
if lock[1] and lock[1] ~= ARGV[1] and tonumber(lock[2]) > now then
  return {'held', lock[1], now - lock[3]}
end
local token = redis.call('INCR', KEYS[2])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'token', token, 'since', string.format('%.0f', now),
  'until', string.format('%.0f', now + ARGV[2]))
return {'ok', token}
