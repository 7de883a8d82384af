-- Give a record other bounds, longer or shorter ones. The record, its begin and the lock stay.
-- KEYS  1 record  2 lock  3 wait  4 retired
-- ARGV  1 token ('': no lock, the version alone is compared)  2 versions that may be changed
--       3 absolute timeout (ms from now; 0: none)  4 idle timeout (ms from the last request; 0: none)
--       5 nonce of the new version
-- Reply {'C', version, now} it has these bounds
--       'GONE' | 'LOST' another has the lock | 'CONFLICT': nothing is written
-- Own retry: the new version lies there already.
-- include record
local now, token = clock(), ARGV[1]
local state, value = read(KEYS[1])
if state == 'A' then
  require_primary(KEYS[1])
  return 'GONE'
elseif state == 'X' then
  return 'CONFLICT'
end
local nonce = sub(value, 7, 22)
if nonce == ARGV[5] then
  return {'C', sub(value, 7, 64), now}
end
local holder = token ~= '' and holder_of(KEYS[2])
if holder and holder ~= token then
  return 'LOST'
elseif not string.find(ARGV[2], nonce, 1, true) then
  return 'CONFLICT'
end

local absolute, idle, began = bounds_of(value)
local came = now - quiet(KEYS[1], absolute, idle, began, now)
absolute, idle = tonumber(ARGV[3]), tonumber(ARGV[4])
local ends = absolute > 0 and now + absolute or 0
local left = sooner(absolute, idle > 0 and math.max(came + idle - now, 1) or 0)
local head, body = header(ARGV[5], ends, idle, began), sub(value, byte(value, 5) == 50 and 66 or 52)
redis.call('SET', KEYS[1], head .. body, 'PX', left)
return {'C', sub(head, 7, 64), now}
