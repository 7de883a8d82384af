-- Say what was found at sessions of a user's index.
-- KEYS  1 the user's index, as in link.lua
-- ARGV  1 how long (ms) a link is believed, as its record may still come
--       2 for each session three lines: its id, the time that its link had, and what was found
--         'K' it lives: known to be right now  'E' it was ended: forgotten
--         'N' nothing of this user's: forgotten, unless the link is to be believed
-- Reply the number forgotten
-- A link that was made anew since it was looked at stays, and its session is not being ended any more: it was
-- signed in after that.
-- include record
local now, forgotten = clock(), 0
for id, seen, found in string.gmatch(ARGV[2], '([^\n]+)\n([^\n]+)\n(%u)\n') do
  local since = tonumber(redis.call('ZSCORE', KEYS[1], id) or 0)
  local age = now - math.abs(since)
  local anew = math.abs(since) ~= math.abs(tonumber(seen))
  if found == 'K' then
    if since == tonumber(seen) then
      redis.call('ZADD', KEYS[1], 'XX', now, id)
    end
  elseif not anew and (found == 'E' or age >= tonumber(ARGV[1])) then
    forgotten = forgotten + redis.call('ZREM', KEYS[1], id)
  elseif since < 0 then
    redis.call('ZADD', KEYS[1], -since, id)
  end
end
return forgotten
