-- Note that a session belongs to a user, or that it still does.
-- KEYS  1 the user's index: a sorted set, session ids by the time (ms) of which the link is known to be right;
--       a negative time: the session is being ended, and stays so whoever links it
-- ARGV  1 session id  2 time to live (ms): the index's is prolonged, never shortened
--       3 how long (ms) a link is believed  4 how many others the caller will look at, each fourth time
-- Reply links for the caller to look at, id and time in turn. First, up to half of that number, those that
--       somebody began to end and did not finish. Each fourth time also those that nobody looked at for longest
-- include record
local now = clock()
local known = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0)
local since = math.max(now, math.abs(known) + 1) -- another time: whoever is ending it sees that it was linked anew
redis.call('ZADD', KEYS[1], known < 0 and -since or since, ARGV[1])
redis.call('PEXPIRE', KEYS[1], math.max(redis.call('PTTL', KEYS[1]), tonumber(ARGV[2])))

local most = tonumber(ARGV[4])
local look = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(0', 'WITHSCORES', 'LIMIT', 0, math.floor(most / 2))
if redis.call('ZCARD', KEYS[1]) % 4 == 0 then
  local rest = redis.call(
    'ZRANGEBYSCORE', KEYS[1], 0, now - tonumber(ARGV[3]), 'WITHSCORES', 'LIMIT', 0, most - #look / 2
  )
  for _, each in ipairs(rest) do
    look[#look + 1] = each
  end
end
return look
