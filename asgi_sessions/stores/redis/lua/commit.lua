-- Write a checked-out record if its version is the one loaded and nobody else has the lock. The TTL stays.
-- The lease itself may have run out: if nobody has taken the lock since, the version shows that nothing has changed.
-- KEYS  1 record  2 lock  3 wait  4 retired
-- ARGV  1 token ('': no lock, the version alone is compared)  2 format and version loaded, 50 bytes  3 new value
--       4 claim of the next holder (ms) where the lock is let go, else ''
--       5 with a claim: '1' in a cluster. Without: who holds the lock from now on, or '' where that stays as it is
--       6 versions of earlier commits of this caller whose outcome it does not know; may be left out
-- Reply 'STORED'  |  'UNHELD' stored, and the lock, which was to stay ours, is free: the lease had run out (both
--       with the nonce of the new value)
--       'GONE' | 'LOST' another has the lock | 'CONFLICT': nothing is written. A lock of ours on a record that is
--       gone is let go in any case.
-- Own retry: the new version lies there already. (If the next holder has written over it since, the reply is
-- LOST or CONFLICT: the change is in what that holder loaded, but nobody can tell here.)
local token, release = ARGV[1], ARGV[4] ~= ''

-- The common case, in which nothing has changed and nobody waits, returns here, before any function is defined.
-- Where somebody waits the script goes on below. There the write made here looks like an own retry.
if redis.pcall('GETRANGE', KEYS[1], '0', '49') == ARGV[2]
  and (token == '' or redis.call('GETRANGE', KEYS[2], '0', '31') == token) then
  redis.call('SET', KEYS[1], ARGV[3], 'KEEPTTL')
  if not release and ARGV[5] ~= '' then
    redis.call('SET', KEYS[2], token .. ARGV[5], 'KEEPTTL')
  end
  if token == '' or not release then
    return 'STORED' .. string.sub(ARGV[3], 7, 22)
  end
  if redis.call('EXISTS', KEYS[3]) == 0 then
    redis.call('DEL', KEYS[2])
    return 'STORED' .. string.sub(ARGV[3], 7, 22)
  end
end

-- include record
local state, head = read(KEYS[1], true)
local version = head and version_of(head)
local holder = token ~= '' and holder_of(KEYS[2])
local outcome = 'STORED'

if state == 'A' then
  require_primary(KEYS[1])
  outcome = 'GONE'
elseif version ~= version_of(ARGV[3]) then
  if holder and holder ~= token then
    outcome = 'LOST'
  elseif not version or (version ~= version_of(ARGV[2]) and not string.find(ARGV[6] or '', version, 1, true)) then
    outcome = 'CONFLICT'
  else
    redis.call('SET', KEYS[1], ARGV[3], 'KEEPTTL')
  end
end
local ours = token ~= '' and (not holder or holder == token) -- or nobody's any more
if ours and (release or outcome == 'GONE') then
  -- include handover
  hand_over(tonumber(ARGV[4]), ARGV[5] == '1', false)
elseif ours and outcome == 'STORED' and not holder then
  outcome = 'UNHELD'
end
if outcome == 'STORED' or outcome == 'UNHELD' then
  outcome = outcome .. string.sub(ARGV[3], 7, 22)
end
return outcome
