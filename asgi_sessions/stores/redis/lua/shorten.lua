-- Shorten the life of a record to a rule that is newer than it. A record that has ended by the rule is deleted.
-- KEYS  1 record  2 lock  3 wait  4 retired
-- ARGV  1 token ('': no lock; then nothing is written)  2 absolute timeout (ms from the begin; 0: none)
--       3 idle timeout (ms; 0: none)  4 the channel on which it is told, by the record's key, that a session has ended
-- Reply {'L', record, now} it lives on, with the shorter bounds if it is locked
--       {'A'} absent, or ended by the rule  {'R'} retired  {'X'} not a record of ours; nothing is locked any more
--       {'B', lock's ttl} the lock is not ours any more; nothing is done
-- Own retry: there is nothing left to shorten, or to delete.
-- include record
-- include handover
local token, now = ARGV[1], clock()
local state, value = read(KEYS[1])
local ours = token ~= '' and holder_of(KEYS[2]) == token
if state ~= 'L' and ours then
  return {dismiss(state, now)}
elseif state ~= 'L' then
  return {state == 'A' and redis.call('EXISTS', KEYS[4]) == 1 and 'R' or state}
elseif token ~= '' and not ours then
  return {'B', redis.call('PTTL', KEYS[2])}
end

local absolute, idle, began = bounds_of(value)
local came = now - quiet(KEYS[1], absolute, idle, began, now)
local ends = absolute
if began > 0 and ARGV[2] ~= '0' then
  ends = sooner(ends, began + tonumber(ARGV[2]))
end
idle = sooner(idle, tonumber(ARGV[3]))
if ends == 0 and idle == 0 then
  return {'L', value, now}
end
local left = sooner(ends, idle > 0 and came + idle or 0) - now
if left <= 0 then
  if ours then
    redis.call('DEL', KEYS[1])
    redis.pcall('PUBLISH', ARGV[4], KEYS[1])
    dismiss('A', now)
  end
  return {'A'}
end
if ours then
  local bounds = string.format('%013.0f:%013.0f', ends, idle)
  redis.call('SETRANGE', KEYS[1], 23, bounds)
  redis.call('PEXPIRE', KEYS[1], left)
  value = string.sub(value, 1, 23) .. bounds .. string.sub(value, 51)
end
return {'L', value, now}
