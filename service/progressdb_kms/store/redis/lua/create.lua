#!lua
-- Store a new DEK, unless its id is taken.
-- KEYS  1 record  2 the thread's index  3 census of the KEK version  4 the slot's control hash
-- ARGV  1 key_id  2 thread_id  3 wrapped  4 kek_id  5 kek_version  6 created_at  7 created_by
-- Returns {'created', version} | {'found', the record's fields and values} | {'collision'} | {'stale', floor}
local thread = redis.call('HGET', KEYS[1], 'thread_id')
if thread then
  if thread ~= ARGV[2] then
    return {'collision'}
  end
  -- A replay is an acknowledgement too. WAITAOF and WAIT speak of what their connection wrote, so write.
  redis.call('HINCRBY', KEYS[4], 'touched', 1)
  return {'found', redis.call('HGETALL', KEYS[1])}
end
local floor = tonumber(redis.call('HGET', KEYS[4], 'floor') or '0')
if tonumber(ARGV[5]) < floor then
  return {'stale', floor}
end
local last = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
local version = tonumber(last[2] or '0') + 1
redis.call('HSET', KEYS[1], 'thread_id', ARGV[2], 'wrapped', ARGV[3], 'kek_id', ARGV[4], 'kek_version', ARGV[5],
  'version', version, 'state', 'enabled', 'created_at', ARGV[6], 'created_by', ARGV[7])
redis.call('ZADD', KEYS[2], version, ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
return {'created', version}
