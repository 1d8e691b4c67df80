#!lua
-- Write what a slot's snapshot holds into its manifest, where a destruction has unsealed it.
-- KEYS  1 the slot's control hash      ARGV  1 manifest's field  2 count  3 digest
-- Returns 1 if it was written, 0 if not
local manifest = redis.call('HGET', KEYS[1], ARGV[1])
local buckets = manifest and string.match(manifest, '^(%d+) %-1$')
redis.call('HINCRBY', KEYS[1], 'touched', 1)
if not buckets then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], buckets .. ' ' .. ARGV[2] .. ' ' .. ARGV[3])
return 1
