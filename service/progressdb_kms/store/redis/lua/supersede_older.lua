#!lua
-- Let a key of the older form only decrypt from now on: its thread, whose slot is another one, has its next DEK.
-- KEYS  1 record  2 the slot's control hash
-- ARGV  1 thread_id  2 ms on this server's clock before the notice  3 most ms since then  4 now, seconds
-- Returns 'ok' | 'late'
local time = redis.call('TIME')
local age = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[2]
if age < 0 or age > tonumber(ARGV[3]) then
  return 'late'
end
redis.call('HINCRBY', KEYS[2], 'touched', 1)
local found = redis.call('HMGET', KEYS[1], 'thread_id', 'state')
if found[1] ~= ARGV[1] then
  -- Its index had it before its record was there: whoever moves it in is not done, or never was.
  return 'ok'
end
if found[2] == 'enabled' then
  redis.call('HSET', KEYS[1], 'state', 'decrypt_only', 'changed_at', ARGV[4])
elseif found[2] == 'disabled' or found[2] == 'pending_destruction' then
  -- What is disabled now must not come back as one that encrypts.
  redis.call('HSET', KEYS[1], 'resume_state', 'decrypt_only')
end
return 'ok'
