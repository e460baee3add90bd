-- Who makes a call that several balancers want: one atomic step by the server's own clock.
-- KEYS[1]: the flight, a hash of `holder` (a token) and `wanted` (milliseconds that somebody else would wait for it).
-- KEYS[2]: the stream of the caller's own flight. ARGV[1]: what to do, ARGV[2]: the caller's token, then:
--   claim LEASE_MS WANTED_MS: "" when the flight is now the caller's, else the holder's token; it is told it is wanted.
--   renew LEASE_MS: hold it for longer; -1 when it is another's, else how long it was wanted since the last renewal, or 0.
--   end KEEP_MS ENTRY HOW FORCE: give it up; with FORCE "1", or where it is wanted, HOW is the stream's last entry.
local step, token, ms = ARGV[1], ARGV[2], ARGV[3]
local holder = redis.call("HGET", KEYS[1], "holder")
if step == "claim" then
  if not holder or holder == token then
    redis.call("HSET", KEYS[1], "holder", token)
    redis.call("PEXPIRE", KEYS[1], ms)
    return ""
  end
  local wanted = tonumber(redis.call("HGET", KEYS[1], "wanted") or "0") or 0
  redis.call("HSET", KEYS[1], "wanted", string.format("%.0f", math.max(wanted, tonumber(ARGV[4]))))
  return holder
end
local wanted = false
if holder == token then
  wanted = redis.call("HGET", KEYS[1], "wanted")
end
if step == "renew" then
  if holder ~= token then
    return -1
  end
  redis.call("HDEL", KEYS[1], "wanted")
  redis.call("PEXPIRE", KEYS[1], ms)
  return tonumber(wanted or "0") or 0
end
if holder == token then
  redis.call("DEL", KEYS[1])
end
if wanted or ARGV[6] == "1" then
  redis.call("XADD", KEYS[2], ARGV[4], "end", ARGV[5])
  redis.call("PEXPIRE", KEYS[2], ms)
end
return 0
