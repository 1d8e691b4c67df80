#!lua
-- Offer slots for a step of a rotation, once.
-- KEYS  1 lock  2 rotation  3 work      ARGV  1 token of the lock  2 step  3... tags
-- Returns 'ok' | 'fenced'
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
  return 'fenced'
end
local opened = 'opened:' .. ARGV[2]
-- The mark, not the work, says that it was offered: work that is all done has gone.
local known = redis.call('HEXISTS', KEYS[2], opened)
redis.call('HSET', KEYS[2], opened, 1)
if known == 0 then
  for i = 3, #ARGV do
    redis.call('ZADD', KEYS[3], 0, ARGV[i])
  end
end
return 'ok'
