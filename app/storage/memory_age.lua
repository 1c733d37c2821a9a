-- For how long this server has remembered what it was told, as far as anybody asked: microseconds.
--
-- KEYS    1 since    when it was asked first

local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
redis.call('SET', KEYS[1], string.format('%.0f', now_us), 'NX')
return math.max(0, now_us - tonumber(redis.call('GET', KEYS[1])))
