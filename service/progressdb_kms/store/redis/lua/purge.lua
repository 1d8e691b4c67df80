#!lua
-- Remove some buckets of a slot's part of a snapshot; with the last of them, its manifest and its quarantine.
-- KEYS  1 the slot's control hash  2 quarantine
-- ARGV  1 manifest's field  2 start of a bucket's key  3 first bucket  4 how many
-- Returns the bucket to go on with, 0 at the end
local manifest = redis.call('HGET', KEYS[1], ARGV[1])
local buckets = manifest and tonumber(string.match(manifest, '^%d+')) or 0
local last = math.min(ARGV[3] + ARGV[4], buckets)
for bucket = tonumber(ARGV[3]), last - 1 do
  redis.call('UNLINK', ARGV[2] .. bucket)
end
redis.call('HINCRBY', KEYS[1], 'touched', 1)
if last < buckets then
  return last
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('UNLINK', KEYS[2])
return 0
