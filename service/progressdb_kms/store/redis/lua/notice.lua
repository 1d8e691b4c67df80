#!lua
-- Say that a key's state is about to change, and forget what everybody has read or missed for good.
-- KEYS  1 stream of changes      ARGV  1 key_id  2 ms to keep a notice
-- Returns the notice's id
local time = redis.call('TIME')
local oldest = time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[2]
return redis.call('XADD', KEYS[1], 'MINID', '~', string.format('%.0f', oldest), '*', 'key_id', ARGV[1])
