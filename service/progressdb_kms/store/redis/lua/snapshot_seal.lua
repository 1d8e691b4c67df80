#!lua
-- Write what a slot's verified snapshot holds into its manifest.
-- KEYS  1 the slot's control hash      ARGV  1 token  2 manifest's field  3 count  4 digest  5 start of a bucket's key
-- Returns 'ok' | 'fenced' | 'unbegun' | 'changed': a key was destroyed since the copies were read
local ctl = redis.call('HMGET', KEYS[1], 'fence', ARGV[2])
if ctl[1] ~= ARGV[1] then
  return 'fenced'
end
if not ctl[2] then
  return 'unbegun'
end
-- Whoever has the claim alone adds copies, and none is ever changed: what is gone shows in the number.
local count = 0
for bucket = 0, tonumber(string.match(ctl[2], '^%d+')) - 1 do
  count = count + redis.call('HLEN', ARGV[5] .. bucket)
end
if count ~= tonumber(ARGV[3]) then
  return 'changed'
end
redis.call('HSET', KEYS[1], ARGV[2], string.match(ctl[2], '^%d+') .. ' ' .. ARGV[3] .. ' ' .. ARGV[4])
return 'ok'
