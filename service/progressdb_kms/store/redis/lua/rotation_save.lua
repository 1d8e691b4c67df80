#!lua
-- Persist a rotation, and whether it is the one under way.
-- KEYS  1 lock  2 rotation  3 index of rotations  4 name of the one under way  5... work and claims of its steps
-- ARGV  1 token of the lock  2 rotation_id  3 record  4 started_at  5 '1' if it is finished
-- Returns 'ok' | 'fenced'
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
  return 'fenced'
end
redis.call('HSET', KEYS[2], 'record', ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[2])
if ARGV[5] ~= '1' then
  redis.call('SET', KEYS[4], ARGV[2])
else
  if redis.call('GET', KEYS[4]) == ARGV[2] then
    redis.call('DEL', KEYS[4])
  end
  redis.call('UNLINK', unpack(KEYS, 5))
end
return 'ok'
