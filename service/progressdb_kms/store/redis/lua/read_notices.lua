#!lua flags=no-writes
-- Read the notices after one, together with what tells whether any was lost in between.
-- KEYS  1 stream of changes      ARGV  1 id after which to read, '' for none  2 most notices
-- Returns {id of the last notice ever, number of notices ever, key_ids...}
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'0-0', 0}
end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
local facts = {}
for i = 1, #info, 2 do
  facts[info[i]] = info[i + 1]
end
local reply = {facts['last-generated-id'], facts['entries-added']}
if ARGV[1] ~= '' then
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])) do
    table.insert(reply, entry[2][2])
  end
end
return reply
