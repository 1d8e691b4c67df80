#!lua flags=no-writes
-- Read some records of a slot under one KEK version, with their copies in a snapshot if one is named.
-- KEYS  1 census of the version  2 the slot's control hash
-- ARGV  1 cursor  2 how many  3 KEK version  4 start of a record's key  5 manifest's field, '' for no snapshot
--       6 start of a bucket's key
-- Returns {cursor, lengths, bytes, key_ids of the census without a record of the version...}
-- Lengths are four numbers a record, of key_id, thread_id, blob and copy, whose bytes stand in that order: two long
-- strings are read many times faster than thousands of short ones.
local step = redis.call('SSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local manifest = ARGV[5] ~= '' and redis.call('HGET', KEYS[2], ARGV[5])
local buckets = manifest and tonumber(string.match(manifest, '^%d+'))
local lengths, bytes, reply, at = {}, {}, {step[1], '', ''}, 0
for n, id in ipairs(step[2]) do
  local found = redis.call('HMGET', ARGV[4] .. id, 'thread_id', 'wrapped', 'kek_version')
  local thread, blob = found[1], found[2]
  if thread and blob and found[3] == ARGV[3] then
    local copy = ''
    if buckets then
      local bucket = (tonumber(string.sub(id, -4), 36) or 0) % buckets
      copy = redis.call('HGET', ARGV[6] .. bucket, id) or ''
    end
    lengths[#lengths + 1] = struct.pack('>I4I4I4I4', #id, #thread, #blob, #copy)
    bytes[at + 1], bytes[at + 2], bytes[at + 3], bytes[at + 4] = id, thread, blob, copy
    at = at + 4
  else
    reply[#reply + 1] = id
  end
end
reply[2], reply[3] = table.concat(lengths), table.concat(bytes)
return reply
