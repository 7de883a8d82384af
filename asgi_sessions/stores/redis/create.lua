-- Store a new record, never over another.
-- KEYS  1 record  2 lock
-- ARGV  1 nonce  2 JSON  3 absolute timeout (ms; 0: none)  4 idle timeout (ms; 0: none)
--       5 token ('': no lock)  6 lease (ms)
-- Reply {'C', version} created, and locked under the token  |  {'E'} something lies there already
-- Own retry: a record with this nonce lies there already.
-- include record
local absolute, idle = tonumber(ARGV[3]), tonumber(ARGV[4])
local state, head = read(KEYS[1], 50, true)
local version = head and version_of(head)
if state ~= 'A' and (state == 'X' or string.sub(version, 1, 16) ~= ARGV[1]) then
  return {'E'}
end
if state == 'A' then
  local head = header(ARGV[1], absolute > 0 and clock() + absolute or 0, idle)
  redis.call('SET', KEYS[1], head .. ARGV[2], 'PX', first_end(absolute, idle))
  version = string.sub(head, 7, 50)
end
if ARGV[5] ~= '' then
  redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[6])
end
return {'C', version}
