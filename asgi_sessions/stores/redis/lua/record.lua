-- Shared chunk: what lies at a record's key, and Redis' clock.
-- A record is 'asgi2:' nonce(16) ':' absolute end(13) ':' idle timeout(13) ':' begin(13) '\n' JSON. Times are in ms,
-- 0 for none; the life began with creation or sign-in. An earlier release wrote 'asgi1:' nonce ':' end ':' idle ':'
-- JSON, which is still read; its begin is unknown. The version is what lies between 'asgi2:' and '\n'. Two versions
-- are the same if their first 44 bytes are, which both formats share. What follows the header is never parsed here.

local byte, sub = string.byte, string.sub

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local SHAPE = '^asgi%d:%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x:%d%d%d%d%d%d%d%d%d%d%d%d%d:%d%d%d%d%d%d%d%d%d%d%d%d%d:'
local BEGIN = '^%d%d%d%d%d%d%d%d%d%d%d%d%d\n'

-- 'A' absent | 'X' not a record of ours | 'L', value; with `head`, the header is enough.
-- This checks the outline, prefix and colons; with `strictly` also the digits between them, which costs more than
-- all the rest of a request's script.
local function read(key, head, strictly)
  local value = redis.pcall('GETRANGE', key, 0, head and 64 or -1)
  if value == '' then
    return redis.call('EXISTS', key) == 1 and 'X' or 'A'
  end
  if type(value) == 'table' then
    if string.find(value.err, 'WRONGTYPE', 1, true) then
      return 'X'
    end
    redis.call('GETRANGE', key, 0, 0) -- raises again what has nothing to do with the key's type
  end
  local format = sub(value, 1, 6)
  if byte(value, 23) ~= 58 or byte(value, 37) ~= 58 or byte(value, 51) ~= 58
    or (format ~= 'asgi1:' and (format ~= 'asgi2:' or byte(value, 65) ~= 10))
    or (strictly and not string.find(value, SHAPE))
    or (strictly and format == 'asgi2:' and not string.find(value, BEGIN, 52)) then
    return 'X'
  end
  return 'L', value
end

-- Absence is believed from a primary only. This call changes nothing, and a replica, which may lag, refuses it.
local function require_primary(key)
  redis.call('PERSIST', key)
end

-- The token that holds a lock, without who that is behind it; false where the lock is free.
local function holder_of(key)
  local value = redis.call('GET', key)
  return value and sub(value, 1, 32)
end

local function version_of(value)
  return sub(value, 7, 50)
end

-- The absolute end, the idle timeout and the begin.
local function bounds_of(value)
  local began = byte(value, 5) == 50 and tonumber(sub(value, 52, 64)) or 0
  return tonumber(sub(value, 24, 36)) or 0, tonumber(sub(value, 38, 50)) or 0, began
end

-- The lesser of two ends or spans of time, where 0 is none.
local function sooner(one, other)
  if one == 0 or (other > 0 and other < one) then
    return other
  end
  return one
end

-- For how long nobody came, by what is left of the idle timeout, but not since before the begin. Where there is no
-- such timeout, or where the absolute end comes first (with a second of tolerance), that is not known: 0.
local function quiet(key, absolute, idle, began, now)
  local left = redis.call('PTTL', key)
  if idle > 0 and left >= 0 and (absolute == 0 or now + left < absolute - 1000) then
    return math.max(math.min(idle - left, now - began), 0)
  end
  return 0
end

-- A request came: the idle timeout restarts, but never beyond the absolute end. By a shorter `rule` (ms; 0: none)
-- the session may have ended already. Then nothing restarts.
local function keep_alive(key, value, now, rule)
  local absolute, idle, began = bounds_of(value)
  if idle > 0 and (rule == 0 or rule >= idle or quiet(key, absolute, idle, began, now) < rule) then
    redis.call('PEXPIRE', key, sooner(absolute > 0 and math.max(absolute - now, 1) or 0, idle))
  end
end

local function header(nonce, absolute, idle, began)
  return string.format('asgi2:%s:%013.0f:%013.0f:%013.0f\n', nonce, absolute, idle, began)
end
