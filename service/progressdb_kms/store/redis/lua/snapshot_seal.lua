#!lua
-- Write what a slot's verified snapshot holds into its manifest.
-- KEYS  1 the slot's control hash      ARGV  1 token  2 manifest's field  3 count  4 digest
-- Returns 'ok' | 'fenced' | 'unbegun'
local ctl = redis.call('HMGET', KEYS[1], 'fence', ARGV[2])
if ctl[1] ~= ARGV[1] then
  return 'fenced'
end
if not ctl[2] then
  return 'unbegun'
end
redis.call('HSET', KEYS[1], ARGV[2], string.match(ctl[2], '^%d+') .. ' ' .. ARGV[3] .. ' ' .. ARGV[4])
return 'ok'
