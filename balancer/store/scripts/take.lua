#!lua flags=allow-oom
-- Take tokens from one bucket, in one atomic step and by the server's own clock.
-- KEYS[1]: the bucket. ARGV: tokens per second, burst, cost, "1" to take what is not there (a debt).
-- Returns {seconds until the cost would be there (0: granted), tokens left, seconds until full} as text.
-- Kept as "<tokens> <microseconds>", the time of the last change, and only until the bucket would be full again:
-- a bucket that is not there is full, and so is one whose value makes no sense.
-- A full server (maxmemory) still runs this: see the first line.
local rate, burst, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call("TIME")
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])

local tokens = burst
local kept = redis.pcall("GET", KEYS[1])
if type(kept) == "string" then
  local had, at = string.match(kept, "^(%-?%d[%d.e+-]*) (%d+)$")
  had, at = had and tonumber(had), at and tonumber(at)
  if had and at and had > -1e15 then
    -- A server clock that stepped back refills nothing, and counting goes on from where it is.
    tokens = math.min(burst, had + math.max(0, now - at) * rate / 1000000)
  end
end

if cost > tokens and cost > 0 and ARGV[4] ~= "1" then
  return {string.format("%.6f", (cost - tokens) / rate), string.format("%.6f", tokens),
          string.format("%.6f", (burst - tokens) / rate)}
end

tokens = math.min(burst, tokens - cost)
local reset = (burst - tokens) / rate
if reset > 0 then
  -- A debt is forgotten after 30 days; an expiry has to be a whole number of milliseconds that Redis can add up.
  local expiry = math.min(math.ceil(reset * 1000), 2592000000)
  redis.call("SET", KEYS[1], string.format("%.17g %.0f", tokens, now), "PX", string.format("%.0f", expiry))
else
  redis.call("DEL", KEYS[1])
end
return {"0", string.format("%.6f", tokens), string.format("%.6f", reset)}
