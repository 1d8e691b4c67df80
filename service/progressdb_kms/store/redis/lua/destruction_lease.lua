#!lua
-- Take or prolong the right to carry out destructions.
-- KEYS  1 hash of it      ARGV  1 owner  2 ms
-- Returns 1 if it is the owner's now, 0 if another has it
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local held = redis.call('HMGET', KEYS[1], 'owner', 'until')
if held[1] and held[1] ~= ARGV[1] and tonumber(held[2]) > now then
  return 0
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'until', string.format('%.0f', now + ARGV[2]))
return 1
