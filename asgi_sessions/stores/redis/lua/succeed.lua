-- Link the new id of a session that moves, unless its old one was ended or is being ended.
-- KEYS  1 the user's index, as in link.lua
-- ARGV  1 old id  2 new id ('': the new one is another user's, the old one is asked about only)
--       3 time to live (ms) of the index: prolonged, never shortened
-- Reply the old link's time  |  nil: nothing is linked, the session has to end
-- The old link stays until the old record is removed, because the session is still there.
local since = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not since or tonumber(since) < 0 then
  return false
end
-- include record
if ARGV[2] ~= '' then
  redis.call('ZADD', KEYS[1], 'NX', clock(), ARGV[2])
  redis.call('PEXPIRE', KEYS[1], math.max(redis.call('PTTL', KEYS[1]), tonumber(ARGV[3])))
end
return since
