#!lua flags=no-writes
-- Read one bucket of a snapshot.
-- KEYS  1 bucket
-- Returns {lengths, bytes}: two numbers an entry, of key_id and blob, whose bytes stand in that order
local entries = redis.call('HGETALL', KEYS[1])
local lengths = {}
for i = 1, #entries, 2 do
  lengths[#lengths + 1] = struct.pack('>I4I4', #entries[i], #entries[i + 1])
end
return {table.concat(lengths), table.concat(entries)}
