-- Prolong a lease.
-- KEYS  1 lock: a token of 32 digits, and behind it who holds it
-- ARGV  1 token  2 lease from now (ms)
-- Reply 1 prolonged  |  0 the lock is not ours any more
if redis.call('GETRANGE', KEYS[1], '0', '31') ~= ARGV[1] then
  return 0
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
