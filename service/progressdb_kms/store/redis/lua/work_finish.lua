#!lua
-- Mark a slot's part of a step as done, and add to the rotation's counts, both once.
-- KEYS  1 work  2 claims  3 rotation      ARGV  1 tag  2 token  3... name of a count, number
-- Returns 'ok' | 'fenced'
local claim = redis.call('HGET', KEYS[2], ARGV[1])
if not claim or string.match(claim, '^%d+') ~= ARGV[2] then
  return 'fenced'
end
-- A retry is an acknowledgement too, so write.
redis.call('HSET', KEYS[2], ARGV[1], claim)
if redis.call('ZREM', KEYS[1], ARGV[1]) == 1 then
  for i = 3, #ARGV, 2 do
    redis.call('HINCRBY', KEYS[3], 'n:' .. ARGV[i], ARGV[i + 1])
  end
end
return 'ok'
