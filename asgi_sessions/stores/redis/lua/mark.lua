-- Begin to end a user's sessions: from here on none of them can move to a new id.
-- KEYS  1 the user's index, as in link.lua
-- ARGV  1 the session that is kept ('': none); it is ended too where somebody began that earlier
-- Reply all that are being ended, also those that somebody else has left so: id and (negative) time in turn
-- That there is nothing to end is believed from a primary only: '' is nobody's id, and a replica, which may lag,
-- refuses to remove it.
redis.call('ZREM', KEYS[1], '')

local AT_ONCE = 1000 -- values on Lua's stack
local index = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
local marked, changes = {}, {}
for i = 1, #index, 2 do
  local id, since = index[i], tonumber(index[i + 1])
  if since >= 0 and id ~= ARGV[1] then
    since = -math.max(since, 1)
    changes[#changes + 1] = since
    changes[#changes + 1] = id
    if #changes == AT_ONCE then
      redis.call('ZADD', KEYS[1], unpack(changes))
      changes = {}
    end
  end
  if since < 0 then
    marked[#marked + 1] = id
    marked[#marked + 1] = string.format('%.0f', since)
  end
end
if #changes > 0 then
  redis.call('ZADD', KEYS[1], unpack(changes))
end
return marked
