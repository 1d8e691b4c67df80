#!lua
-- Move a key to another state, unless the notice of the change is too old to have reached everybody in time.
-- KEYS  1 record  2 destructions that fall due  3 the slot's control hash
-- ARGV  1 key_id  2 ms on this server's clock before the notice  3 most ms since then  4 state to go to, or 'resume'
--       5 states to come from, joined by commas  6 states with nothing to do, likewise  7 now, seconds
--       8 destroy_at or ''  9... record fields
-- Returns {'ok', values of the record fields...} | {'refused', state} | {'late'} | {'missing'}
local function has(list, item)
  return string.find(',' .. list .. ',', ',' .. item .. ',', 1, true) ~= nil
end
local state = redis.call('HGET', KEYS[1], 'state')
if not state then
  return {'missing'}
end
local time = redis.call('TIME')
local age = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[2]
-- A clock that went back (a failover, a step) proves nothing: as late as one that ran on.
if age < 0 or age > tonumber(ARGV[3]) then
  return {'late'}
end
redis.call('HINCRBY', KEYS[3], 'touched', 1)
if has(ARGV[6], state) then
  return {'ok', redis.call('HMGET', KEYS[1], unpack(ARGV, 9))}
end
if not has(ARGV[5], state) then
  return {'refused', state}
end
local to = ARGV[4]
if to == 'resume' then
  to = redis.call('HGET', KEYS[1], 'resume_state') or 'enabled'
  redis.call('HDEL', KEYS[1], 'resume_state')
elseif state == 'decrypt_only' then
  redis.call('HSET', KEYS[1], 'resume_state', state)
end
redis.call('HSET', KEYS[1], 'state', to, 'changed_at', ARGV[7])
if to == 'pending_destruction' then
  redis.call('HSET', KEYS[1], 'destroy_at', ARGV[8])
  redis.call('ZADD', KEYS[2], ARGV[8], ARGV[1])
else
  redis.call('HDEL', KEYS[1], 'destroy_at')
  redis.call('ZREM', KEYS[2], ARGV[1])
end
return {'ok', redis.call('HMGET', KEYS[1], unpack(ARGV, 9))}
