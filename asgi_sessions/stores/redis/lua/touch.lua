-- A request came: the idle timeout of its record restarts, but never beyond the absolute end.
-- KEYS  1 record
-- ARGV  1 idle timeout by the caller's rule (ms; 0: none); where it is over by that, nothing restarts
-- Reply 1 there is a record of ours  |  0 there is none
-- include record
local state, head = read(KEYS[1], true)
if state ~= 'L' then
  return 0
end
keep_alive(KEYS[1], head, clock(), tonumber(ARGV[1]))
return 1
