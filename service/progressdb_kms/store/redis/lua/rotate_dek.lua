#!lua
-- Store a new DEK of a thread, unless its id is taken, and let the thread's enabled ones only decrypt from now on.
-- KEYS  1 record  2 the thread's index  3 census of the KEK version  4 the slot's control hash
-- ARGV  1 key_id  2 thread_id  3 wrapped  4 kek_id  5 kek_version  6 created_at  7 created_by
--       8 ms on this server's clock before the notices  9 most ms since then  10 start of a record's key
--       11 key_ids that were noticed, joined by commas
-- Returns {'created', version} | {'found', the record's fields and values} | {'collision'} | {'stale', floor}
--       | {'late'}: too late, or a key that would change was not noticed
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
local time = redis.call('TIME')
local age = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[8]
if age < 0 or age > tonumber(ARGV[9]) then
  return {'late'}
end
local noticed = {}
for id in string.gmatch(ARGV[11], '[^,]+') do
  noticed[id] = true
end
local enabled, resting = {}, {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local state = redis.call('HGET', ARGV[10] .. id, 'state')
  if state == 'enabled' then
    if not noticed[id] then
      return {'late'}
    end
    enabled[#enabled + 1] = id
  elseif state == 'disabled' or state == 'pending_destruction' then
    resting[#resting + 1] = id
  end
end
for _, id in ipairs(enabled) do
  redis.call('HSET', ARGV[10] .. id, 'state', 'decrypt_only', 'changed_at', ARGV[6])
end
for _, id in ipairs(resting) do
  -- What is disabled now must not come back as one that encrypts.
  redis.call('HSET', ARGV[10] .. id, 'resume_state', 'decrypt_only')
end
local last = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
local version = tonumber(last[2] or '0') + 1
redis.call('HSET', KEYS[1], 'thread_id', ARGV[2], 'wrapped', ARGV[3], 'kek_id', ARGV[4], 'kek_version', ARGV[5],
  'version', version, 'state', 'enabled', 'created_at', ARGV[6], 'created_by', ARGV[7])
redis.call('ZADD', KEYS[2], version, ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
return {'created', version}
