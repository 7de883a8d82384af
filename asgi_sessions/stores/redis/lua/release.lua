-- Let a lock go, or leave its queue: undoes an acquire, whatever became of it.
-- KEYS  1 record  2 lock  3 wait  4 retired
-- ARGV  1 token  2 claim of the next holder (ms)  3 '1': in a cluster  4 '1': a lock without record
-- Reply 1 the lock was ours and is let go  |  0 it was not; a place in the queue is given up
local ours = redis.call('GETRANGE', KEYS[2], '0', '31') == ARGV[1]
if ours and redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('DEL', KEYS[2]) -- nearly always
  return 1
end

-- include record
-- include handover
if ours then
  hand_over(tonumber(ARGV[2]), ARGV[3] == '1', ARGV[4] == '1')
  return 1
end
leave(ARGV[1])
return 0
