-- Lock and load a record, or queue for the lock.
-- KEYS  1 record  2 lock  3 wait  4 retired
-- ARGV  1 token and who that is ('': load without a lock)  2 lease (ms; 0 without a lock)
--       3 wait (ms; 0: do not queue). Left out: 0, and the caller need not be told the time
--       A caller who may queue gives four more:
--       4 wake channel or '-'
--       5 the token under which the caller queued before, or ''
--       6 '1': a lock without a record
--       7 idle timeout by the caller's rule (ms; 0: none). A caller who has to queue counts as activity, unless
--         the session is over by that rule. '-': the caller does not count
-- Reply {'L', record, now} loaded, and locked under the token unless the lease is 0. To two arguments nearly
--       always the record alone
--       {'A'} absent  {'R'} retired  {'X'} not a record of ours; nothing is locked
--       {'B', lock's ttl} busy, not queued
--       {'W', lock's ttl, now} queued under the token
--       {'K', lock's ttl, now} still queued under the earlier token; the new one counts for nothing
-- Own retry: the token that holds the lock gets 'L', one that is queued gets 'W'.

-- The common case, a free lock, returns here, before any function is defined. (To ask for the time and to reply
-- with a table costs half as much again as all the rest.)
if #ARGV < 4 then
  local value = redis.pcall('GET', KEYS[1])
  if type(value) == 'string' and string.byte(value, 65) == 10 and string.sub(value, 1, 6) == 'asgi2:'
    and (ARGV[1] == '' or redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])) then
    if not ARGV[3] then
      return value
    end
    local time = redis.call('TIME')
    return {'L', value, time[1] * 1000 + math.floor(time[2] / 1000)}
  end
end

-- include record
local token, lease, wait = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3] or 0)
local earlier, bare, state, record, now = ARGV[5] or '', ARGV[6] == '1', 'L', '', clock()
if not bare then
  state, record = read(KEYS[1])
end
if state == 'L' and (lease == 0 or (earlier == '' and redis.call('SET', KEYS[2], token, 'NX', 'PX', lease))) then
  return {'L', record, now}
end

-- include handover
if state ~= 'L' then
  if state == 'A' then
    require_primary(KEYS[1])
    state = redis.call('EXISTS', KEYS[4]) == 1 and 'R' or 'A'
  end
  if earlier ~= '' and holder_of(KEYS[2]) == earlier then
    dismiss(state, now)
  elseif earlier ~= '' then
    leave(earlier)
  end
  return {state}
end

-- A lock under the earlier token was handed over to this caller, who missed the message.
local holder, fresh = holder_of(KEYS[2]), string.match(token, '^[^.]+')
if not holder or holder == fresh or (earlier ~= '' and holder == earlier) then
  redis.call('SET', KEYS[2], token, 'PX', lease)
  if earlier ~= '' then
    leave(earlier)
  end
  return {'L', record, now}
end

local ttl = redis.call('PTTL', KEYS[2])
if wait == 0 then
  return {'B', ttl}
end
if not bare and ARGV[7] ~= '-' then
  keep_alive(KEYS[1], record, now, tonumber(ARGV[7]))
end
for _, entry in ipairs(redis.call('LRANGE', KEYS[3], 0, -1)) do
  local queued = select(3, waiter(entry))
  if queued == earlier then
    return {'K', ttl, now}
  elseif queued == fresh then
    return {'W', ttl, now}
  end
end
local first = redis.call('LINDEX', KEYS[3], 0)
while first and waiter(first) <= now do
  redis.call('LPOP', KEYS[3])
  first = redis.call('LINDEX', KEYS[3], 0)
end
redis.call('RPUSH', KEYS[3], string.format('%.0f %s %s', now + wait, ARGV[4], token))
redis.call('PEXPIRE', KEYS[3], math.max(redis.call('PTTL', KEYS[3]), wait + 1000))
return {'W', ttl, now}
