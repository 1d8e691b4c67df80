#!lua
-- Trim the stream of audit records behind signed floors, and forget chains that nothing names any more.
-- KEYS  1 heads  2 stream  3 roster  4 floors
-- ARGV  1 the roster that was read  2 the one that takes its place  3 id of the first record that stays, '' for all
--       4 number of floors  5... chain, floor of each, then the chains to forget
-- Returns 'ok' | 'roster'
local roster = redis.call('GET', KEYS[3]) or ''
if roster == ARGV[2] then
  -- A repetition: it has been done.
  redis.call('SET', KEYS[3], ARGV[2])
  return 'ok'
end
if roster ~= ARGV[1] then
  return 'roster'
end
local forgotten = 5 + 2 * tonumber(ARGV[4])
for i = 5, forgotten - 1, 2 do
  redis.call('HSET', KEYS[4], ARGV[i], ARGV[i + 1])
end
for i = forgotten, #ARGV do
  redis.call('HDEL', KEYS[1], ARGV[i])
  redis.call('HDEL', KEYS[4], ARGV[i])
end
if ARGV[3] ~= '' then
  redis.call('XTRIM', KEYS[2], 'MINID', ARGV[3])
end
redis.call('SET', KEYS[3], ARGV[2])
return 'ok'
