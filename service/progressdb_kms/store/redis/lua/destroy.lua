#!lua
-- Destroy a key that is due: its blob goes from the record and from every snapshot of the slot, a tombstone stays.
-- KEYS  1 record  2 destructions that fall due  3 the slot's control hash  4 destroyed keys
-- ARGV  1 key_id  2 ms on this server's clock before the notice  3 most ms since then  4 now, seconds
--       5 what is written down of it  6 '1' to destroy it in whatever state it is
--       7 start of a census's key  8 start of a bucket's key without the rotation  9 start of a quarantine's key
--       10... of each snapshot: rotation, its manifest, its manifest without the key
-- Returns 'ok' | 'late' | 'not due' | 'changed': a snapshot is not what was said
local found = redis.call('HMGET', KEYS[1], 'state', 'destroy_at', 'kek_version')
local time = redis.call('TIME')
local age = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[2]
-- A clock that went back (a failover, a step) proves nothing: as late as one that ran on.
if age < 0 or age > tonumber(ARGV[3]) then
  return 'late'
end
redis.call('HINCRBY', KEYS[3], 'touched', 1)
if found[1] == 'destroyed' then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return 'ok'
end
if not found[1] then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return 'not due'
end
-- Both clocks, the caller's and this one, have to agree that the waiting is over: it can't be taken back.
if ARGV[6] ~= '1' then
  if found[1] ~= 'pending_destruction' then
    redis.call('ZREM', KEYS[2], ARGV[1])
  end
  local due = tonumber(found[2] or '')
  if found[1] ~= 'pending_destruction' or not due or due > tonumber(ARGV[4]) or due > tonumber(time[1]) then
    return 'not due'
  end
end
local known = {}
for i = 10, #ARGV, 3 do
  known['b:' .. ARGV[i]] = {ARGV[i + 1], ARGV[i + 2]}
end
local ctl = redis.call('HGETALL', KEYS[3])
for i = 1, #ctl, 2 do
  if string.sub(ctl[i], 1, 2) == 'b:' and not (known[ctl[i]] and known[ctl[i]][1] == ctl[i + 1]) then
    return 'changed'
  end
end
for i = 1, #ctl, 2 do
  local rotation = string.match(ctl[i], '^b:(.+)$')
  if rotation then
    local buckets = tonumber(string.match(ctl[i + 1], '^%d+'))
    local bucket = (tonumber(string.sub(ARGV[1], -4), 36) or 0) % buckets
    if redis.call('HDEL', ARGV[8] .. rotation .. ':' .. bucket, ARGV[1]) == 1 then
      -- Together with the copy, or whoever dies in between leaves a snapshot that nobody seals again.
      redis.call('HSET', KEYS[3], ctl[i], known[ctl[i]][2])
    end
    redis.call('HDEL', ARGV[9] .. rotation, ARGV[1])
  end
end
redis.call('HDEL', KEYS[1], 'wrapped', 'destroy_at', 'resume_state')
redis.call('HSET', KEYS[1], 'state', 'destroyed', 'changed_at', ARGV[4])
redis.call('SREM', ARGV[7] .. (found[3] or ''), ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[4], ARGV[1], ARGV[5])
return 'ok'
