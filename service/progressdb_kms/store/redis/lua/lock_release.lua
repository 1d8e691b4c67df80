#!lua
-- Give the lock of rotations back, if it is still held under the token.
-- KEYS  1 lock      ARGV  1 token
-- Returns 'ok'
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then
  redis.call('DEL', KEYS[1])
end
return 'ok'
