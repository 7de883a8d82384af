-- A request came: the idle timeout of its record restarts, but never beyond the absolute end. A record without an
-- idle timeout lives to its absolute end from now on, also one that was made to end sooner.
-- KEYS  1 record
-- ARGV  1 idle timeout by the caller's rule (ms; 0: none); where it is over by that, nothing restarts
-- Reply 1 there is a record of ours  |  0 there is none
-- include record
local state, head = read(KEYS[1], true)
if state ~= 'L' then
  return 0
end
local now, absolute, idle = clock(), bounds_of(head)
if idle > 0 then
  keep_alive(KEYS[1], head, now, tonumber(ARGV[1]))
elseif absolute > 0 then
  redis.call('PEXPIRE', KEYS[1], math.max(absolute - now, 1))
end
return 1
