#!lua
-- Raise a slot's fence to a claim's token.
-- KEYS  1 the slot's control hash      ARGV  1 token
-- Returns 'ok' | 'fenced'
if tonumber(redis.call('HGET', KEYS[1], 'fence') or '0') > tonumber(ARGV[1]) then
  return 'fenced'
end
redis.call('HSET', KEYS[1], 'fence', ARGV[1])
return 'ok'
