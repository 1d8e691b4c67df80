#!lua flags=no-writes
-- Read the registry of KEKs at one moment.
-- KEYS  1 schema  2 KEKs
-- Returns {fields and values of the schema, fields and values of the KEKs}
return {redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2])}
