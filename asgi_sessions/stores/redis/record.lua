-- Shared chunk: what lies at a record's key, and Redis' clock.
-- A record is 'asgi1:' nonce(16) ':' absolute end(13, ms, 0 none) ':' idle(13, ms, 0 none) ':' JSON.
-- Its version is everything between the first and the last of these colons. JSON is never parsed here.

local byte = string.byte

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local SHAPE = '^asgi1:%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x%x:%d%d%d%d%d%d%d%d%d%d%d%d%d:%d%d%d%d%d%d%d%d%d%d%d%d%d:'

-- 'A' absent | 'X' not a record of ours | 'L', value; with `last`, the bytes up to there are enough.
-- The outline is looked at, prefix and colons; `strictly` the digits between them too, which costs more than
-- all the rest of a request's script.
local function read(key, last, strictly)
  local value = redis.pcall('GETRANGE', key, 0, last or -1)
  if value == '' then
    return redis.call('EXISTS', key) == 1 and 'X' or 'A'
  end
  if type(value) == 'table' then
    if string.find(value.err, 'WRONGTYPE', 1, true) then
      return 'X'
    end
    redis.call('GETRANGE', key, 0, 0) -- raises again what has nothing to do with the key's type
  end
  if string.sub(value, 1, 6) == 'asgi1:' and byte(value, 23) == 58 and byte(value, 37) == 58
    and byte(value, 51) == 58 and (not strictly or string.find(value, SHAPE)) then
    return 'L', value
  end
  return 'X'
end

-- Absence is believed from a primary only: this changes nothing, and a replica, which may lag, refuses it.
local function require_primary(key)
  redis.call('PERSIST', key)
end

local function version_of(value)
  return string.sub(value, 7, 50)
end

-- The absolute end and the idle timeout.
local function bounds_of(value)
  return tonumber(string.sub(value, 24, 36)) or 0, tonumber(string.sub(value, 38, 50)) or 0
end

-- The earlier of two spans of time, where 0 is no bound.
local function first_end(absolute, idle)
  if absolute == 0 or (idle > 0 and idle < absolute) then
    return idle
  end
  return absolute
end

-- A request came: the idle timeout restarts, but never beyond the absolute end.
local function keep_alive(key, value, now)
  if string.sub(value, 38, 50) ~= '0000000000000' then
    local absolute, idle = bounds_of(value)
    local left = absolute > 0 and math.max(absolute - now, 1) or 0
    redis.call('PEXPIRE', key, first_end(left, idle))
  end
end

local function header(nonce, absolute, idle)
  return string.format('asgi1:%s:%013.0f:%013.0f:', nonce, absolute, idle)
end
