-- Note that a session belongs to a user, and since when.
-- KEYS  1 the user's sorted set
-- ARGV  1 session id  2 time to live (ms): the set's is prolonged, never shortened
-- Reply the number of sessions noted
-- include record
redis.call('ZADD', KEYS[1], clock(), ARGV[1])
redis.call('PEXPIRE', KEYS[1], math.max(redis.call('PTTL', KEYS[1]), tonumber(ARGV[2])))
return redis.call('ZCARD', KEYS[1])
