-- Write a record whoever holds it; a holder's commit then finds another version.
-- KEYS  1 record
-- ARGV  1 nonce  2 JSON  3 ttl (ms; 0: an existing record keeps what is left of its life)
--       4 ttl of a new record (ms)  5 '0': never bring back a record that is absent
--       The ttl bounds the life absolutely; the idle timeout of an existing record stays, and when it began.
-- Reply 1 stored over another  |  3 stored where there was none
--       0 not a record of ours, left alone  |  2 absent, and so it stays
-- Own retry: the nonce lies there already.
-- include record
local state, head = read(KEYS[1], true, true)
if state == 'X' then
  return 0
elseif state == 'A' and ARGV[5] == '0' then
  require_primary(KEYS[1])
  return 2
end
local now, ttl = clock(), tonumber(ARGV[3])
local absolute, idle, began = 0, 0, now
if state == 'L' then
  if string.sub(head, 7, 22) == ARGV[1] then
    return 1
  end
  absolute, idle, began = bounds_of(head)
end
if state == 'L' and ttl == 0 then
  redis.call('SET', KEYS[1], header(ARGV[1], absolute, idle, began) .. ARGV[2], 'KEEPTTL')
else
  ttl = ttl > 0 and ttl or tonumber(ARGV[4])
  redis.call('SET', KEYS[1], header(ARGV[1], now + ttl, idle, began) .. ARGV[2], 'PX', sooner(ttl, idle))
end
return state == 'L' and 1 or 3
