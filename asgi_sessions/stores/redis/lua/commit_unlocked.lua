-- Write a record that was loaded without a lock, if nobody holds the lock and nobody has changed it. The TTL stays.
-- KEYS  1 record  2 lock  3 wait  4 retired
-- ARGV  1 format and version loaded, 50 bytes  2 new value
--       3 versions of earlier commits of this caller whose outcome it does not know, or ''
-- Reply 'STORED' with the nonce of the new value
--       'GONE' | 'CONFLICT' | 'BUSY' somebody holds the lock: nothing is written
-- Own retry: the new version lies there already, whoever has the lock by now.

-- The common case returns here, before any function is defined.
if redis.pcall('GETRANGE', KEYS[1], '0', '49') == ARGV[1] and redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
  return 'STORED' .. string.sub(ARGV[2], 7, 22)
end

-- include record
local state, head = read(KEYS[1], true)
if state == 'A' then
  require_primary(KEYS[1])
  return 'GONE'
end
local version = head and version_of(head)
if version ~= version_of(ARGV[2]) then
  if not version or (version ~= version_of(ARGV[1]) and not string.find(ARGV[3], version, 1, true)) then
    return 'CONFLICT'
  end
  if redis.call('EXISTS', KEYS[2]) == 1 then
    return 'BUSY'
  end
  redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
end
return 'STORED' .. string.sub(ARGV[2], 7, 22)
