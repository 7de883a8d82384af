-- Delete a record, and tell everybody who waits for it.
-- KEYS  1 record  2 lock  3 wait  4 retired
-- ARGV  1 token ('': whoever holds it)  2 versions that may be deleted ('': whatever it says)
--       3 remember as retired (ms; 0: no)  4 claim of the next holder (ms)  5 '1': in a cluster
--       6 this call's own name  7 the id to which a retired one leads, or ''; see follow.lua
--       8 the channel on which it is told, by the record's key, that a session has ended
-- Reply 'STORED' and the call's name: deleted | 'GONE' was absent | 'LOST' another has the lock
--       'CONFLICT' another version | 'X' not a record of ours, left alone. With a token our lock is let go, whatever
--       the reply. (A lease that has run out is as good as held where nobody took the lock since: the version tells
--       that nothing has changed.)
-- Own retry: the retired key remembers the call by its name (others may have loaded the same version). Without
--       one, a record that this call deleted is 'GONE'.
-- include record
-- include handover
local token, expected, retire = ARGV[1], ARGV[2], tonumber(ARGV[3])
local state, head = read(KEYS[1], true, true)
local version = head and version_of(head)
local holder = token ~= '' and holder_of(KEYS[2])
local outcome = 'STORED'

if state == 'A' then
  local own = expected ~= '' and redis.call('GETRANGE', KEYS[4], 0, #ARGV[6] - 1) == ARGV[6]
  outcome = own and 'STORED' or 'GONE'
elseif holder and holder ~= token then
  outcome = 'LOST'
elseif expected ~= '' and not (version and string.find(expected, version, 1, true)) then
  outcome = 'CONFLICT'
elseif state == 'X' then
  return 'X'
else
  redis.call('DEL', KEYS[1])
  redis.pcall('PUBLISH', ARGV[8], KEYS[1]) -- which may be forbidden: whoever waits for the end looks, then
  if retire > 0 then
    redis.call('SET', KEYS[4], ARGV[6] .. ARGV[7], 'PX', retire)
  end
end
if outcome == 'STORED' or outcome == 'GONE' then
  dismiss('A', clock())
elseif token ~= '' and outcome == 'CONFLICT' then
  hand_over(tonumber(ARGV[4]), ARGV[5] == '1', false)
end
return outcome == 'STORED' and outcome .. ARGV[6] or outcome
