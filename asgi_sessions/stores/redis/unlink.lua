-- Forget that a session belongs to a user, unless that was noted just now: links precede their records.
-- KEYS  1 the user's sorted set
-- ARGV  1 session id  2 the least age of a link that is forgotten (ms)
-- Reply 1 forgotten | 0 kept, or not there
-- include record
local since = redis.call('ZSCORE', KEYS[1], ARGV[1])
if since and clock() - tonumber(since) >= tonumber(ARGV[2]) then
  return redis.call('ZREM', KEYS[1], ARGV[1])
end
return 0
