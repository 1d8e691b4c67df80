#!lua
-- Store a DEK under an id of the older form, unless it is taken; its thread's index, in another slot, has it already.
-- KEYS  1 record  2 census of the KEK version  3 the slot's control hash
-- ARGV  1 key_id  2 thread_id  3 wrapped  4 kek_id  5 kek_version  6 created_at  7 created_by  8 version
-- Returns {'created', version} | {'found', the record's fields and values} | {'collision'} | {'stale', floor}
local thread = redis.call('HGET', KEYS[1], 'thread_id')
if thread then
  if thread ~= ARGV[2] then
    return {'collision'}
  end
  -- A replay is an acknowledgement too. WAITAOF and WAIT speak of what their connection wrote, so write.
  redis.call('HINCRBY', KEYS[3], 'touched', 1)
  return {'found', redis.call('HGETALL', KEYS[1])}
end
local floor = tonumber(redis.call('HGET', KEYS[3], 'floor') or '0')
if tonumber(ARGV[5]) < floor then
  return {'stale', floor}
end
redis.call('HSET', KEYS[1], 'thread_id', ARGV[2], 'wrapped', ARGV[3], 'kek_id', ARGV[4], 'kek_version', ARGV[5],
  'version', ARGV[8], 'state', 'enabled', 'created_at', ARGV[6], 'created_by', ARGV[7])
redis.call('SADD', KEYS[2], ARGV[1])
return {'created', tonumber(ARGV[8])}
