#!lua
-- Mark the store as being filled from a file, if it has no registry and is not being filled from another.
-- KEYS  1 mark  2 schema  3 KEKs      ARGV  1 SHA-256 of the file  2 '1' if the store holds records
-- Returns 1 if it may be filled, 0 if not
local mark = redis.call('GET', KEYS[1])
if mark and mark ~= ARGV[1] or not mark and (ARGV[2] == '1' or redis.call('EXISTS', KEYS[2], KEYS[3]) > 0) then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1])
return 1
