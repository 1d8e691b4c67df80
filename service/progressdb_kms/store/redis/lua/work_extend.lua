#!lua
-- Go on holding claims, but for those that another has taken.
-- KEYS  1 work  2 claims      ARGV  1 lease, ms  2... tag, token
-- Returns how many are held
local time = redis.call('TIME')
local till = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1])
local held = 0
for i = 2, #ARGV, 2 do
  local claim = redis.call('HGET', KEYS[2], ARGV[i])
  if claim and string.match(claim, '^%d+') == ARGV[i + 1] then
    redis.call('ZADD', KEYS[1], 'XX', till, ARGV[i])
    held = held + 1
  end
end
return held
