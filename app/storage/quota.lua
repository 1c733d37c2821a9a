-- One account's quotas, shared by all replicas: the arithmetic of quota.py, atomic, by this server's clock.
--
-- KEYS    1 state    what was granted, as one MessagePack map; kept for a day after its last use
--         2 open     grants that are not settled: id -> {start, tokens, requests}
--         3 held     the slots that they hold: id -> when the lease ends, microseconds
--         4 stale    the same ids -> when nobody needs to remember them, microseconds
-- ARGV    1 operation: reserve, settle, throttled, charge, renew
--         2 its arguments, a MessagePack map:
--           limits     {requests per minute, tokens per minute, slots}, 0 for none
--           spans      microseconds over which the vendor judges
--           seen       {born, serial, tokens, requests} of the state that the caller saw last; born 0: none yet
--           charges    {{age in microseconds, tokens, requests}, ...} granted while this server was away
--           seed       only where the state was lost: {tokens = {{age, amount}, ...}, requests = {...}}
--           and what its function below takes
-- Returns a MessagePack map: born, before (when the state was born that this one takes the place of), serial, tokens,
-- requests (the net sums of all time), and the answer; or {lost = true} when there is no state and no seed.

local S_US = 1000000
local MINUTE_US = 60 * S_US
local SLOT_US = S_US / 4
local SLOTS_PER_SPAN, MARGINS_PER_SPAN = 40, 120
local BOOK_AHEAD_US = {free = S_US / 4, paced = S_US / 40, bulk = S_US / 40}
local CREDIT_US, WORTH_US, LEAD_US, DEBT_US = S_US, S_US / 4, 2 * S_US, 10 * S_US
local KEPT_FROM = {bulk = 50, paced = 200}
local PLACES, PLACE_US, PLACE_GRACE_US, ALIKE = 64, 5 * S_US, S_US / 2, 8
local CALL_US = S_US / 20
local WHOLE, CUT, LEAST_RATE, REGAINED, REGAIN_US = 10000, 8500, 500, 100, 10 * S_US
local STATED_US = MINUTE_US
local KEEP_S = 86400
local BULK = 2
local NEVER = -1

local floor, ceil, max, min, abs = math.floor, math.ceil, math.max, math.min, math.abs
local ask = cmsgpack.unpack(ARGV[2])
local state

-- ── windows ─────────────────────────────────────────────────────────────────────────────────────────────────────────
-- A window's ring is a flat list of slot and amount, oldest first, of the slots in which anything was granted.

local function opened(per_minute, span_us, kept)
  local w = kept or {newest = 0, level = 0, ring = {}}
  w.slot_us = min(SLOT_US, max(1, floor(span_us / SLOTS_PER_SPAN)))
  local margin_us = max(floor(span_us / MARGINS_PER_SPAN), w.slot_us)
  w.slots = ceil((span_us + margin_us) / w.slot_us) + 1
  w.limit = floor(per_minute * span_us / MINUTE_US)
  return w
end

local function advance(w, at_us)
  local slot = floor(at_us / w.slot_us)
  if slot <= w.newest then return end
  w.newest = slot
  local ring, gone = w.ring, 0
  while ring[gone + 1] and ring[gone + 1] <= slot - w.slots do
    w.level = w.level - ring[gone + 2]
    gone = gone + 2
  end
  if gone > 0 then
    local kept = {}
    for at = gone + 1, #ring do kept[at - gone] = ring[at] end
    w.ring = kept
  end
end

local function add(w, at_us, amount)
  local slot = floor(at_us / w.slot_us)
  if slot <= w.newest - w.slots or amount == 0 then return end
  w.level = w.level + amount
  local ring = w.ring
  local at = #ring - 1
  while at > 0 and ring[at] > slot do at = at - 2 end
  if at > 0 and ring[at] == slot then
    ring[at + 1] = ring[at + 1] + amount
  else
    table.insert(ring, at + 2, amount)
    table.insert(ring, at + 2, slot)
  end
end

local function falls_by(w, amount)
  if amount <= 0 then return (w.newest + 1) * w.slot_us end
  local left = amount
  for at = 1, #w.ring, 2 do
    left = left - w.ring[at + 1]
    if left <= 0 then return (w.ring[at] + w.slots) * w.slot_us end
  end
  return (w.newest + w.slots) * w.slot_us
end

-- ── dimensions ──────────────────────────────────────────────────────────────────────────────────────────────────────

local function earned(d, of_us, rate)
  return floor(floor(of_us * d.per_minute / MINUTE_US) * rate / WHOLE)
end

local function cost(d, amount, rate)
  return floor(floor(amount * MINUTE_US / d.per_minute) * WHOLE / rate)
end

local function most(d, w, now_us)
  if now_us >= d.stated_until then return w.limit end
  return floor(w.limit * d.stated / d.per_minute)
end

local function room(d, w, want, now_us)
  local cap = floor(min(w.limit, most(d, w, now_us)) * want.rate / WHOLE)
  local kept = KEPT_FROM[want.manner]
  if kept then cap = cap - floor(cap / kept) end
  return cap - w.level - want.ahead
end

local function window_ready(d, w, want, now_us)
  local too_much = want.least - room(d, w, want, now_us)
  if too_much <= 0 or (w.level == 0 and want.ahead == 0) then return 0 end
  if too_much <= w.level then return falls_by(w, too_much) end
  return falls_by(w, w.level) + (want.ahead > 0 and w.slots * w.slot_us or 0)
end

local function ready(d, want, now_us)
  if d.per_minute == 0 then return 0 end
  local ready_us = 0
  for _, w in ipairs(d.open) do ready_us = max(ready_us, window_ready(d, w, want, now_us)) end
  if want.manner == 'free' then return ready_us end
  local ahead_us = cost(d, want.ahead, want.rate)
  if want.manner == 'paced' then return max(ready_us, d.spent_until + ahead_us - LEAD_US) end
  local worth_us = max(cost(d, want.least, want.rate), min(cost(d, want.most, want.rate), WORTH_US))
  return max(ready_us, d.spent_until + ahead_us + min(worth_us, CREDIT_US))
end

local function count(d, at_us, amount, rate)
  if d.per_minute == 0 then return end
  for _, w in ipairs(d.open) do add(w, at_us, amount) end
  d.spent_until = max(d.spent_until, at_us - CREDIT_US) + cost(d, amount, rate)
end

local function take(d, want, at_us)
  if d.per_minute == 0 then return want.most end
  local taken = want.most
  for _, w in ipairs(d.open) do taken = min(taken, room(d, w, want, at_us)) end
  local idle_us = at_us - d.spent_until
  if want.manner == 'bulk' then
    taken = min(taken, earned(d, min(idle_us, CREDIT_US), want.rate) - want.ahead)
  elseif want.manner == 'paced' and idle_us < CREDIT_US then
    taken = min(taken, earned(d, idle_us + LEAD_US, want.rate) - want.ahead)
  end
  taken = max(want.least, taken)
  count(d, at_us, taken, want.rate)
  if want.manner == 'free' then d.spent_until = min(d.spent_until, at_us + DEBT_US) end
  return taken
end

local function hear(d, per_minute, left, now_us)
  if per_minute == NEVER or d.per_minute == 0 then return end
  d.stated, d.stated_until = per_minute, now_us + STATED_US
  if left == NEVER then return end
  for _, w in ipairs(d.open) do
    if w.limit == d.per_minute then add(w, now_us, max(0, min(per_minute, w.limit) - left - w.level)) end
  end
end

-- ── the account ─────────────────────────────────────────────────────────────────────────────────────────────────────

local function dimension(kept, per_minute)
  local d = kept or {spent_until = -CREDIT_US, stated = 0, stated_until = 0, windows = {}}
  d.per_minute, d.open = per_minute, {}
  local longest
  for _, w in pairs(d.windows) do
    if not longest or #w.ring > #longest.ring then longest = w end
  end
  local windows = {}
  if per_minute > 0 then
    for _, span_us in ipairs(ask.spans) do
      local name = tostring(span_us)
      local w = opened(per_minute, span_us, d.windows[name])
      if not d.windows[name] and longest then
        advance(w, longest.newest * longest.slot_us)
        for at = 1, #longest.ring, 2 do add(w, longest.ring[at] * longest.slot_us, longest.ring[at + 1]) end
      end
      windows[name] = w
      table.insert(d.open, w)
    end
  end
  d.windows = windows
  return d
end

local function longest_us()
  local longest = 0
  for _, d in ipairs({state.t, state.r}) do
    for _, w in ipairs(d.open) do longest = max(longest, w.slots * w.slot_us) end
  end
  return longest > 0 and longest or MINUTE_US
end

local function advance_all(at_us)
  for _, d in ipairs({state.t, state.r}) do
    for _, w in ipairs(d.open) do advance(w, at_us) end
  end
end

local function rate_at(now_us)
  return min(WHOLE, state.rate + REGAINED * max(0, floor((now_us - state.regains_from) / REGAIN_US)))
end

local function count_in(d, at_us, amount)
  for _, w in ipairs(d.open) do add(w, at_us, amount) end
end

-- Counts what was granted elsewhere, at a time that may be past; `net` is what every replica's own books follow.
local function book(at_us, tokens, requests)
  count_in(state.t, at_us, tokens)
  count_in(state.r, at_us, requests)
  state.net_tokens = state.net_tokens + tokens
  state.net_requests = state.net_requests + requests
end

-- The caller saw more of the state before this one than is known of it here.
local function catch_up(now_us, known)
  advance_all(max(now_us, state.frontier))
  book(now_us, max(0, ask.seen[3] - known[3]), max(0, ask.seen[4] - known[4]))
  state.before = ask.seen
end

-- The time of this server, but never backwards: what a jump takes away is given back.
local function clock(known)
  local time = redis.call('TIME')
  local now_us = tonumber(time[1]) * S_US + tonumber(time[2])
  if not known then return now_us, 0 end
  local lag_us = known.lag
  if now_us + lag_us < known.now then lag_us = known.now - now_us end
  return now_us + lag_us, lag_us
end

local function load()
  local packed = redis.call('GET', KEYS[1])
  local kept = packed and cmsgpack.unpack(packed) or nil
  local now_us, lag_us = clock(kept)
  if not kept and not ask.seed then return nil end
  local seen = ask.seen
  state = kept or {
    born = max(now_us, seen[1] + 1), before = seen, serial = 0, net_tokens = seen[3], net_requests = seen[4],
    frontier = 0, paused_until = 0, rate = WHOLE, regains_from = 0, cut_again = 0, places = {},
  }
  state.now, state.lag = now_us, lag_us
  state.t = dimension(state.t, ask.limits[2])
  state.r = dimension(state.r, ask.limits[1])
  if not kept then
    advance_all(now_us)
    for _, part in ipairs(ask.seed.tokens) do count_in(state.t, now_us - part[1], part[2]) end
    for _, part in ipairs(ask.seed.requests) do count_in(state.r, now_us - part[1], part[2]) end
  elseif seen[1] == state.born and seen[2] > state.serial then  -- the server fell back to an older copy of itself
    catch_up(now_us, {state.born, state.serial, state.net_tokens, state.net_requests})
    state.born = max(now_us, state.born + 1)
  elseif seen[1] == state.before[1] and seen[2] > state.before[2] then
    catch_up(now_us, state.before)
  end
  if #ask.charges > 0 then
    advance_all(max(now_us, state.frontier))
    for _, part in ipairs(ask.charges) do book(now_us - part[1], part[2], part[3]) end
  end
  return now_us
end

local function save()
  state.serial = state.serial + 1
  local kept = {}
  for name, value in pairs(state) do kept[name] = value end
  for _, name in ipairs({'t', 'r'}) do
    local d, windows = state[name], {}
    for span, w in pairs(d.windows) do windows[span] = {newest = w.newest, level = w.level, ring = w.ring,
      slot_us = w.slot_us} end
    kept[name] = {spent_until = d.spent_until, stated = d.stated, stated_until = d.stated_until, windows = windows}
  end
  redis.call('SET', KEYS[1], cmsgpack.pack(kept), 'EX', KEEP_S)
end

local function answer(fields)
  fields.born, fields.before, fields.serial = state.born, state.before[1], state.serial
  fields.tokens, fields.requests = state.net_tokens, state.net_requests
  return cmsgpack.pack(fields)
end

-- Slots of replicas that are gone become free; what they left unsettled is forgotten once it has left every window.
local function forget(now_us)
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now_us)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now_us, 'LIMIT', 0, 32)) do
    if not redis.call('ZSCORE', KEYS[3], id) then
      redis.call('HDEL', KEYS[2], id)
      redis.call('ZREM', KEYS[4], id)
    end
  end
  local places = {}
  for _, place in ipairs(state.places) do
    if place.until_us > now_us then table.insert(places, place) end
  end
  state.places = places
end

-- ── operations ──────────────────────────────────────────────────────────────────────────────────────────────────────

local function is_of(place, claim)
  return place.asker == claim.asker and place.class == claim.class and place.requests == claim.requests
    and abs(place.tokens - claim.tokens_min) <= floor(place.tokens / ALIKE)
end

-- Takes claim: id, asker, class (2 * priority + paced), rank, waits, tokens_min, tokens_max, requests, requests_max,
-- lease_us. Answers granted = {tokens, requests}, wait_us; or wait_us and scarce.
local function reserve(now_us)
  local claim = ask.claim
  local known = redis.call('HGET', KEYS[2], claim.id)
  if known then
    local open = cmsgpack.unpack(known)
    return {granted = {open[2], open[3]}, wait_us = max(0, open[1] - now_us)}
  end
  local at_us = max(now_us, state.frontier)
  forget(now_us)
  advance_all(at_us)
  local mine, passed
  local tokens_ahead, requests_ahead, places_ahead = 0, 0, 0
  for at, place in ipairs(state.places) do
    if not mine and is_of(place, claim) then mine = at end
  end
  for at, place in ipairs(state.places) do
    local before = place.class < claim.class
      or (place.class == claim.class and (place.rank < claim.rank
        or (place.rank == claim.rank and (not mine or at < mine))))
    if at ~= mine and before then
      tokens_ahead, requests_ahead = tokens_ahead + place.tokens, requests_ahead + place.requests
      places_ahead = places_ahead + 1
    end
  end
  local rate = rate_at(now_us)
  local manner = claim.class >= 2 * BULK and 'bulk' or claim.class % 2 == 1 and 'paced' or 'free'
  local tokens = {least = claim.tokens_min, most = claim.tokens_max, ahead = tokens_ahead, rate = rate, manner = manner}
  local requests = {least = claim.requests, most = max(claim.requests, claim.requests_max), ahead = requests_ahead,
    rate = rate, manner = manner}
  local tokens_us, requests_us = ready(state.t, tokens, now_us), ready(state.r, requests, now_us)
  local start_us = max(at_us, state.paused_until, tokens_us, requests_us)
  local wait_us, scarce = start_us - now_us, tokens_us >= requests_us and 'tokens' or 'requests'
  local slots = ask.limits[3]
  local crowded = slots > 0 and redis.call('ZCARD', KEYS[3]) + places_ahead >= slots
  if crowded and wait_us < CALL_US then wait_us, scarce = CALL_US, 'slots' end
  if crowded or wait_us > (claim.waits and BOOK_AHEAD_US[manner] or 0) then
    if claim.waits then
      local until_us = now_us + min(wait_us, PLACE_US) + PLACE_GRACE_US
      if mine then
        state.places[mine].until_us, state.places[mine].rank = until_us, claim.rank
      elseif #state.places < PLACES then
        table.insert(state.places, {class = claim.class, rank = claim.rank, asker = claim.asker,
          tokens = claim.tokens_min, requests = claim.requests, until_us = until_us})
      end
    end
    return {wait_us = wait_us, scarce = scarce}
  end
  if mine then table.remove(state.places, mine) end
  advance_all(start_us)
  local granted = {take(state.t, tokens, start_us), take(state.r, requests, start_us)}
  state.net_tokens, state.net_requests = state.net_tokens + granted[1], state.net_requests + granted[2]
  state.frontier = start_us
  redis.call('HSET', KEYS[2], claim.id, cmsgpack.pack({start_us, granted[1], granted[2]}))
  redis.call('ZADD', KEYS[3], start_us + claim.lease_us, claim.id)
  redis.call('ZADD', KEYS[4], start_us + longest_us(), claim.id)
  for at = 2, 4 do redis.call('EXPIRE', KEYS[at], KEEP_S) end
  return {granted = granted, wait_us = wait_us}
end

-- Takes id, tokens_used and requests_used (tokens_used -1: unknown), stated = {requests per minute, tokens per minute,
-- requests left, tokens left}, each -1 if the provider did not say.
local function settle(now_us)
  local known = redis.call('HGET', KEYS[2], ask.id)
  if not known then return {} end
  redis.call('HDEL', KEYS[2], ask.id)
  redis.call('ZREM', KEYS[3], ask.id)
  redis.call('ZREM', KEYS[4], ask.id)
  local open = cmsgpack.unpack(known)
  advance_all(max(now_us, state.frontier))
  if ask.tokens_used ~= NEVER then
    local tokens, requests, rate = ask.tokens_used - open[2], ask.requests_used - open[3], rate_at(now_us)
    count(state.t, open[1], tokens, rate)
    count(state.r, open[1], requests, rate)
    state.net_tokens, state.net_requests = state.net_tokens + tokens, state.net_requests + requests
  end
  hear(state.t, ask.stated[2], ask.stated[4], now_us)
  hear(state.r, ask.stated[1], ask.stated[3], now_us)
  return {}
end

-- Takes rest_us.
local function throttled(now_us)
  state.paused_until = max(state.paused_until, now_us + ask.rest_us)
  if now_us >= state.cut_again then
    state.rate = max(LEAST_RATE, floor(rate_at(now_us) * CUT / WHOLE))
    state.regains_from = now_us + ask.rest_us
    state.cut_again = now_us + max(ask.rest_us, S_US)
  end
  return {}
end

-- Takes ids and lease_us: their calls are still under way.
local function renew(now_us)
  for _, id in ipairs(ask.ids) do redis.call('ZADD', KEYS[3], 'XX', now_us + ask.lease_us, id) end
  return {}
end

local operations = {reserve = reserve, settle = settle, throttled = throttled, renew = renew,
  charge = function() return {} end}

local now_us = load()
if not now_us then return cmsgpack.pack({lost = true}) end
local fields = operations[ARGV[1]](now_us)
save()
return answer(fields)
