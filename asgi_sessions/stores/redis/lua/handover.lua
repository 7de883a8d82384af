-- Shared chunk, for scripts with KEYS 1 record, 2 lock, 3 wait, 4 retired.
-- A waiter is 'deadline channel token', and behind the token '.since.' and who that is, as at a lock. It is told
-- 'token:now:' and then the record, or why there is none.

local function waiter(entry)
  local deadline, channel, token, who = string.match(entry, '^(%d+) (%S+) ([^%s.]+)(%S*)$')
  return tonumber(deadline), channel, token, who
end

local function leave(token)
  for _, entry in ipairs(redis.call('LRANGE', KEYS[3], 0, -1)) do
    if select(3, waiter(entry)) == token then
      redis.call('LREM', KEYS[3], 1, entry)
    end
  end
end

-- Whether somebody listens at this node; true where that cannot be known. A process that listens at a replica
-- hears what is published here, but is not counted: it would take the lock that goes to the next waiter. So this
-- is asked before PUBLISH.
local function listens(channel)
  local count = channel ~= '-' and redis.pcall('PUBSUB', 'NUMSUB', channel)
  return not count or count.err ~= nil or count[2] > 0
end

-- The number of those who heard it; nil where that cannot be known (channel '-', or PUBLISH is forbidden).
local function tell(channel, token, now, news)
  if channel == '-' then
    return nil
  end
  local heard = redis.pcall('PUBLISH', channel, token .. ':' .. string.format('%.0f', now) .. ':' .. news)
  return type(heard) == 'number' and heard or nil
end

-- There is nothing to lock any more. Tell everybody why, and delete lock and queue.
local function dismiss(state, now)
  if state == 'A' and redis.call('EXISTS', KEYS[4]) == 1 then
    state = 'R'
  end
  for _, entry in ipairs(redis.call('LRANGE', KEYS[3], 0, -1)) do
    local _, channel, token = waiter(entry)
    tell(channel, token, now, state)
  end
  redis.call('DEL', KEYS[2], KEYS[3])
  return state
end

-- The lock goes to the first waiter whose deadline has not passed and who hears it; without one it is free.
-- In a cluster PUBLISH counts the subscribers of one node only. There dead waiters are found by the short claim.
local function hand_over(claim, cluster, bare)
  local now, news = clock(), ''
  if not bare then
    local state, value = read(KEYS[1])
    if state ~= 'L' then
      return dismiss(state, now)
    end
    news = value
  end
  local entry = redis.call('LPOP', KEYS[3])
  while entry do
    local deadline, channel, token, who = waiter(entry)
    if deadline > now and (cluster or listens(channel)) then
      if who ~= '' then
        who = string.format('.%013.0f', now) .. sub(who, 15) -- it holds the lock since now
      end
      redis.call('SET', KEYS[2], token .. who, 'PX', claim)
      if tell(channel, token, now, news) ~= 0 or cluster then
        return
      end
    end
    entry = redis.call('LPOP', KEYS[3])
  end
  redis.call('DEL', KEYS[2])
end
