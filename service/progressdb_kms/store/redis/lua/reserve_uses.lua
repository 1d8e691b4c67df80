#!lua
-- Count encryptions of a key before they are made.
-- KEYS  1 record      ARGV  1 how many
-- Returns the new total | nil where there is no such key
if redis.call('EXISTS', KEYS[1]) == 0 then
  return false
end
return redis.call('HINCRBY', KEYS[1], 'uses', ARGV[1])
