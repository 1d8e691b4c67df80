#!lua
-- Make the manifest of a slot's snapshot, unless there is one.
-- KEYS  1 the slot's control hash      ARGV  1 token  2 manifest's field  3 manifest
-- Returns {'ok', manifest} | {'fenced'}
local ctl = redis.call('HMGET', KEYS[1], 'fence', ARGV[2])
if ctl[1] ~= ARGV[1] then
  return {'fenced'}
end
local manifest = ctl[2] or ARGV[3]
redis.call('HSET', KEYS[1], ARGV[2], manifest)
return {'ok', manifest}
