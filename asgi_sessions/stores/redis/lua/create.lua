-- Store a new record, never over another. Its life begins now.
-- KEYS  1 record  2 lock
-- ARGV  1 nonce  2 JSON  3 absolute timeout (ms; 0: none)  4 idle timeout (ms; 0: none)
--       5 token and who that is ('': no lock)  6 lease (ms)
--       7 the header of the record that it follows, whose timeouts it keeps ('': none, ARGV 3 and 4 count)
--       8 how long (ms; 0: no matter) it lives where its client does not come back; see touch.lua
-- Reply {'C', version, now} created, and locked under the token  |  {'E'} something lies there already
-- Own retry: a record with this nonce lies there already.
-- include record
local now, absolute, idle = clock(), tonumber(ARGV[3]), tonumber(ARGV[4])
local ends, began = absolute > 0 and now + absolute or 0, now
if ARGV[7] ~= '' then
  ends, idle, began = bounds_of(ARGV[7])
  absolute = ends > 0 and math.max(ends - now, 1) or 0
end
local state, head = read(KEYS[1], true, true)
if state ~= 'A' and (state == 'X' or string.sub(head, 7, 22) ~= ARGV[1]) then
  return {'E'}
end
if state == 'A' then
  head = header(ARGV[1], ends, idle, began)
  redis.call('SET', KEYS[1], head .. ARGV[2], 'PX', sooner(sooner(absolute, idle), tonumber(ARGV[8])))
end
if ARGV[5] ~= '' then
  redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[6])
end
return {'C', string.sub(head, 7, 64), now}
