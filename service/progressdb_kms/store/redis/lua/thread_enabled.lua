#!lua flags=no-writes
-- Find enabled keys of a thread, the oldest first.
-- KEYS  1 the thread's index
-- ARGV  1 where to begin  2 how many keys to look at  3 start of a record's key
-- Returns {where to go on, -1 at the end, key_ids...}
local first, count = tonumber(ARGV[1]), tonumber(ARGV[2])
local ids = redis.call('ZRANGE', KEYS[1], first, first + count - 1)
local reply = {#ids < count and -1 or first + count}
for _, id in ipairs(ids) do
  if redis.call('HGET', ARGV[3] .. id, 'state') == 'enabled' then
    reply[#reply + 1] = id
  end
end
return reply
