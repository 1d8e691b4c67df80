#!lua
-- Keep records of an audit chain and move its head. Safe to repeat, also with more records behind.
-- KEYS  1 heads  2 stream  3 roster
-- ARGV  1 chain  2 the head for the last record  3 '1' to keep the records, else only the head
--       4 '1' to change the roster  5 the roster that was read  6 the one that takes its place
--       7 number and 8 MAC of the last record that is known to be stored  9... number, MAC, line of each record
-- Returns 'ok' | 'conflict' | 'roster'
local stored = redis.call('HGET', KEYS[1], ARGV[1])
local seq, mac = 0, ARGV[8]
if stored then
  local readable, head = pcall(cjson.decode, stored)
  if not readable or type(head) ~= 'table' then
    return 'conflict'
  end
  seq, mac = head.seq, head.mac
end
-- The head must be one of those that the writer can have left: anything else is another history.
local known = seq == tonumber(ARGV[7]) and mac == ARGV[8]
for i = 9, known and 0 or #ARGV, 3 do
  if tonumber(ARGV[i]) == seq and ARGV[i + 1] == mac then
    known = true
  end
end
if not known then
  return 'conflict'
end
if ARGV[4] == '1' and not stored then
  if (redis.call('GET', KEYS[3]) or '') ~= ARGV[5] then
    return 'roster'
  end
  redis.call('SET', KEYS[3], ARGV[6])
end
for i = 9, ARGV[3] == '1' and #ARGV or 0, 3 do
  if tonumber(ARGV[i]) > seq then
    redis.call('XADD', KEYS[2], '*', 'r', ARGV[i + 2])
  end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 'ok'
