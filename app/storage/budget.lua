-- What is left of a tenant's allowances, shared by all replicas: what they set aside, beside what SQL has booked.
--
-- KEYS    a state for each account and span, a MessagePack map
-- ARGV    1 a MessagePack map:
--           replica, serial    who asks, and for which time: what is older than its last is not heard
--           parts              into how many parts what is left falls
--           settled            replicas that are gone, and whose journals are in SQL
--           age_us             for how long this server has remembered what it was told; -1: not asked for
--           spans              for each key {allowance, booked, own, ahead}: what may be spent; what SQL has, -1 if that
--                              is not known; what the caller spent beside it or set aside; and what it would like to
--                              have besides, so that it need not ask; all in nano-USD
--           claims             {{nano-USD, the numbers of its keys}, ...}
-- Returns a MessagePack map: absent, when a key is not there and `booked` or `age_us` is not known; else
--           wait_us            for so long nothing is granted, since others may have told of more than is known here
--           granted            for each claim, whether
--           short              for each that was not granted the number of the key that has too little left
--           soon               for each whether it would fit if the others gave back what they have ahead
--           spans              for each key {held, left, booked}: by the caller, by nobody, in SQL

local S_US = 1000000
local YOUNG_US = 3 * S_US        -- then every replica has told a server that forgot
local WANTED_US = 2 * S_US       -- for so long nobody holds anything ahead, so that somebody's claim may fit
local GONE_US = 3600 * S_US      -- a replica that is silent for so long holds nothing
local KEEP_S = 259200
local AHEAD = 8                  -- what is held ahead by all is at most one of so many parts of what is left

local ask = cmsgpack.unpack(ARGV[1])
local time = redis.call('TIME')
local now_us = tonumber(time[1]) * S_US + tonumber(time[2])

local states = {}
for at, key in ipairs(KEYS) do
  local packed = redis.call('GET', key)
  if packed then
    states[at] = cmsgpack.unpack(packed)
  elseif ask.age_us < 0 or ask.spans[at][2] < 0 then
    return cmsgpack.pack({absent = true})
  else
    local trusted_us = ask.age_us < YOUNG_US and now_us + YOUNG_US or 0
    states[at] = {booked = 0, trusted_us = trusted_us, wanted_us = 0, held = {}}
  end
end

local wait_us = 0
for at, state in ipairs(states) do
  local mine = state.held[ask.replica]
  if mine and mine.serial >= ask.serial then return cmsgpack.pack({late = true}) end
  local span = ask.spans[at]
  state.booked = math.max(state.booked, span[2])
  for _, gone in ipairs(ask.settled) do state.held[gone] = nil end
  state.others, state.spare = 0, 0
  for replica, entry in pairs(state.held) do
    if entry.at_us < now_us - GONE_US then
      state.held[replica] = nil
    elseif replica ~= ask.replica then
      state.others = state.others + entry.nano
      state.spare = state.spare + entry.ahead
    end
  end
  state.own = span[3]
  state.left = span[1] - state.booked - state.others - state.own
  wait_us = math.max(wait_us, state.trusted_us - now_us)
end

local granted, short, soon = {}, {}, {}
for number, claim in ipairs(ask.claims) do
  local nano, places = claim[1], claim[2]
  granted[number], short[number], soon[number] = wait_us <= 0, 0, true
  for _, at in ipairs(places) do
    local state = states[at]
    if nano > state.left then
      granted[number] = false
      if short[number] == 0 then short[number] = at end
      soon[number] = soon[number] and nano <= state.left + state.spare
    end
  end
  if granted[number] then
    for _, at in ipairs(places) do
      states[at].left, states[at].own = states[at].left - nano, states[at].own + nano
    end
  elseif wait_us <= 0 and soon[number] then
    for _, at in ipairs(places) do states[at].wanted_us = now_us + WANTED_US end
  end
end

local spans = {}
for at, state in ipairs(states) do
  local ahead = 0
  if wait_us <= 0 and state.wanted_us <= now_us then
    ahead = math.max(0, math.min(ask.spans[at][4], math.floor(state.left / (AHEAD * ask.parts))))
  end
  local held = state.own + ahead
  spans[at] = {held, state.left - ahead, state.booked}
  state.held[ask.replica] = held > 0 and {nano = held, ahead = ahead, serial = ask.serial, at_us = now_us} or nil
  local kept = {booked = state.booked, trusted_us = state.trusted_us, wanted_us = state.wanted_us, held = state.held}
  redis.call('SET', KEYS[at], cmsgpack.pack(kept), 'EX', KEEP_S)
end

return cmsgpack.pack({wait_us = math.max(0, wait_us), granted = granted, short = short, soon = soon, spans = spans})
