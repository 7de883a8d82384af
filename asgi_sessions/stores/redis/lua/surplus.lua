-- Begin to end a user's longest idle sessions, so that no more than so many are left.
-- KEYS  1 the user's index, as in link.lua
-- ARGV  1 how many are left  2 the one that has just signed in: it counts unless it is being ended, and is kept
--       3 the others that live, the longest idle first, an id on each line
-- Reply those of them that are being ended by now, whoever began that: id and (negative) time in turn
-- Own retry: what the first one has marked does not count any more.
local living, marked = {}, {}
for id in string.gmatch(ARGV[3], '[^\n]+') do
  local since = tonumber(redis.call('ZSCORE', KEYS[1], id) or 0)
  if since > 0 then
    living[#living + 1] = {id, since}
  elseif since < 0 then
    marked[#marked + 1] = id
    marked[#marked + 1] = string.format('%.0f', since)
  end
end
local kept = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[2]) or 0) > 0 and 1 or 0
for i = 1, math.min(#living, #living + kept - tonumber(ARGV[1])) do
  local id, since = living[i][1], -living[i][2]
  redis.call('ZADD', KEYS[1], since, id)
  marked[#marked + 1] = id
  marked[#marked + 1] = string.format('%.0f', since)
end
return marked
