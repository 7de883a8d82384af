-- Say what was found at sessions of a user's index.
-- KEYS  1 the user's index, as in link.lua
-- ARGV  1 how long (ms) a link is believed, as its record may still come
--       2 for each session three lines: its id, the time that its link had, and what was found
--         'K' it lives: known to be right now
--         'N' nothing of this user's, any more or yet: forgotten, unless the link is to be believed
--         'G' gone: it was ended, or has a new id: forgotten, unless the link was made anew since
-- Reply the number forgotten
-- A link that stays is no longer marked as being ended: all that was signed in when the ending began is gone.
-- include record
local now, believed, forgotten = clock(), tonumber(ARGV[1]), 0
for id, seen, found in string.gmatch(ARGV[2], '([^\n]+)\n([^\n]+)\n(%u)\n') do
  local since = tonumber(redis.call('ZSCORE', KEYS[1], id) or 0)
  local made, made_then = math.abs(since), math.abs(tonumber(seen))
  if found == 'K' then
    if since == tonumber(seen) then
      redis.call('ZADD', KEYS[1], 'XX', now, id)
    end
  elseif now - made >= believed or (found == 'G' and made == made_then) then
    forgotten = forgotten + redis.call('ZREM', KEYS[1], id)
  elseif since < 0 then
    redis.call('ZADD', KEYS[1], -since, id)
  end
end
return forgotten
