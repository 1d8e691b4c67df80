#!lua
-- Write the registry of KEKs, or add what the one that is there lacks, and take away the mark of the import.
-- KEYS  1 mark  2 schema  3 KEKs  4 wraps  5 escrow  6 lock of rotations
-- ARGV  1 schema version  2 store_id  3 created_at  4 active version  5 token of the lock
--       6 number of KEKs, then version and entry of each; then number of wraps, then version and count of each;
--       then number of escrowed KEKs, then version and entry of each
-- Returns 'ok' | 'fenced'
if redis.call('HGET', KEYS[6], 'token') ~= ARGV[5] then
  return 'fenced'
end
redis.call('DEL', KEYS[1])
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('HSET', KEYS[2], 'version', ARGV[1], 'store_id', ARGV[2], 'created_at', ARGV[3])
  redis.call('HSET', KEYS[3], 'active', ARGV[4], 'rev', 0)
end
local at = 6
for part = 3, 5 do
  local last = at + 2 * ARGV[at]
  for n = at + 1, last, 2 do
    if part == 4 then
      -- Counts of two stores of one KEK: the sum is never too few.
      redis.call('HINCRBY', KEYS[part], ARGV[n], ARGV[n + 1])
    else
      redis.call('HSETNX', KEYS[part], ARGV[n], ARGV[n + 1])
    end
  end
  at = last + 1
end
redis.call('HINCRBY', KEYS[3], 'rev', 1)
return 'ok'
