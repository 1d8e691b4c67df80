#!lua
-- Claim slots of a step that nobody works on, or whose worker's lease ran out.
-- KEYS  1 work  2 claims  3 counter of tokens
-- ARGV  1 worker  2 most slots  3 lease, ms
-- Returns {tag, token, ...}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply = {}
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], 0, string.format('%.0f', now), 'LIMIT', 0, ARGV[2])) do
  local token = redis.call('INCR', KEYS[3])
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[3]), tag)
  redis.call('HSET', KEYS[2], tag, token .. ' ' .. ARGV[1])
  table.insert(reply, tag)
  table.insert(reply, token)
end
return reply
