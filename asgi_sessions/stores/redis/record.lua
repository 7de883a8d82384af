-- Shared chunk: what lies at a record's key, and Redis' clock.
-- A record is 'asgi1:' nonce(16) ':' absolute end(13, ms, 0 none) ':' idle(13, ms, 0 none) ':' JSON.
-- Its version is everything between the first and the last of these colons. JSON is never parsed here.

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- 'A' absent | 'X' not a record of ours | 'L', value, version, absolute, idle
local function read(key)
  local value = redis.pcall('GET', key)
  if not value then
    return 'A'
  end
  if type(value) == 'table' then
    if string.find(value.err, 'WRONGTYPE', 1, true) then
      return 'X'
    end
    redis.call('GET', key) -- raises again what has nothing to do with the key's type
  end
  local nonce, absolute, idle = string.match(value, '^asgi1:(%x+):(%d+):(%d+):')
  if not idle or #nonce ~= 16 or #absolute ~= 13 or #idle ~= 13 then
    return 'X'
  end
  return 'L', value, string.sub(value, 7, 50), tonumber(absolute), tonumber(idle)
end

-- The earlier of two spans of time, where 0 is no bound.
local function first_end(absolute, idle)
  if absolute == 0 or (idle > 0 and idle < absolute) then
    return idle
  end
  return absolute
end

-- A request came: the idle timeout restarts, but never beyond the absolute end.
local function keep_alive(key, absolute, idle, now)
  if idle > 0 then
    local left = absolute > 0 and math.max(absolute - now, 1) or 0
    redis.call('PEXPIRE', key, first_end(left, idle))
  end
end

local function header(nonce, absolute, idle)
  return string.format('asgi1:%s:%013.0f:%013.0f:', nonce, absolute, idle)
end
