-- To which id does a replaced one lead?
-- KEYS  1 retired, as remove.lua writes it: a name of 16 bytes, and behind it the id that took its place, if it leads
-- ARGV  1 the replaced id, by which the reply is known
--       2 time to live (ms) of the key, below which it leads no more
-- Reply the replaced id, a space, and the one to which it leads  |  nil: none
local value = redis.call('GET', KEYS[1])
if not value or #value <= 16 or redis.call('PTTL', KEYS[1]) <= tonumber(ARGV[2]) then
  return false
end
return ARGV[1] .. ' ' .. string.sub(value, 17)
