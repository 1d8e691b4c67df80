#!lua
-- Note records that a rotation could not deal with.
-- KEYS  1 the slot's control hash  2 quarantine      ARGV  1 token  2... key_id, entry
-- Returns 'ok' | 'fenced'
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[1] then
  return 'fenced'
end
redis.call('HSET', KEYS[2], unpack(ARGV, 2))
return 'ok'
