#!lua
-- Change the registry of KEKs if it still is the one that was read.
-- KEYS  1 KEKs  2 lock of rotations  3 instances
-- ARGV  1 revision that was read  2 token of the lock, '' where none is needed  3 active version
--       4 time in seconds from which a heartbeat counts as live, '' to ask for none  5... version, entry
-- Returns 'ok' | 'fenced' | 'moved' | {'missing', instances that are live and have not loaded the active version...}
if ARGV[2] ~= '' and redis.call('HGET', KEYS[2], 'token') ~= ARGV[2] then
  return 'fenced'
end
if redis.call('HGET', KEYS[1], 'rev') ~= ARGV[1] then
  return 'moved'
end
-- In the same script as the activation: an instance that comes back between a check and it would be live
-- without the KEK that everybody is to use.
if ARGV[4] ~= '' then
  local missing = {'missing'}
  for _, entry in ipairs(redis.call('HVALS', KEYS[3])) do
    local readable, beat = pcall(cjson.decode, entry)
    -- What is no heartbeat is none here either: it must not break the script.
    if readable and type(beat) == 'table' and type(beat.at) == 'number' and type(beat.kek_versions) == 'table'
        and beat.at >= tonumber(ARGV[4]) and beat.at <= 2 ^ 53 then
      local loaded = false
      for _, version in ipairs(beat.kek_versions) do
        loaded = loaded or version == tonumber(ARGV[3])
      end
      if not loaded then
        table.insert(missing, tostring(beat.instance))
      end
    end
  end
  if #missing > 1 then
    return missing
  end
end
-- Also with nothing to change: whoever repeats a change is told of it as durable, so write.
redis.call('HSET', KEYS[1], 'active', ARGV[3])
if #ARGV > 4 then
  redis.call('HSET', KEYS[1], unpack(ARGV, 5))
  redis.call('HINCRBY', KEYS[1], 'rev', 1)
end
return 'ok'
