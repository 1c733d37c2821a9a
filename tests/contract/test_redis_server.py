"""What callers of a Redis server may rely on, whatever it, the link to it or those who wait for it do."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import sha1
from typing import Any

import pytest
import redis
from redis.asyncio import Redis

from app.domain import Limits, Priority
from app.ports import Claim, Grant, Served
from app.storage.redis_level import RedisLevel
from app.storage.redis_limiter import RedisLimiter
from app.storage.redis_server import RedisServer, Script, StoreDown
from app.storage.redis_shares import RedisShares
from tests.faults.test_secret_keys import everything
from tests.faults.test_sql_faults import our_tasks, until
from tests.levels import SPACE
from tests.servers import HOST, ValkeyProcess, free_port
from tests.tcp_proxy import TcpProxy

SLACK_S = 0.15
"""What may be added to a time, beside what the machine itself takes: see `lag`."""

PATIENCE_S = 2.0
"""Of tests in which it is not what is tried."""

LONGEST_S = 0.1 + SLACK_S
"""Of any call."""

BACK_S = 1.0 + SLACK_S
"""Until a server that answers again is used again."""

PASSWORD = "shown-to-nobody-7c1e"


@pytest.fixture
async def lag() -> AsyncIterator[Callable[[], float]]:
    """The longest that this loop has not turned so far, in seconds: on a busy machine all takes so much longer."""
    worst_s, loop = 0.0, asyncio.get_running_loop()

    async def tick() -> None:
        nonlocal worst_s
        while True:
            due_s = loop.time() + 0.005
            await asyncio.sleep(0.005)
            worst_s = max(worst_s, loop.time() - due_s)

    ticking = asyncio.ensure_future(tick())
    yield lambda: worst_s
    ticking.cancel()


class Echo(Script):
    """A script that returns its argument, which nobody else has sent."""

    def __init__(self) -> None:
        self.text = "return ARGV[1]"
        self.sha1 = sha1(self.text.encode(), usedforsecurity=False).hexdigest()


def getting(name: str) -> Callable[[Redis], Awaitable[Any]]:
    """A use that asks for what is at `name`."""
    return lambda client: client.get(name)


def setting(name: str, value: str) -> Callable[[Redis], Awaitable[Any]]:
    """A use that writes."""
    return lambda client: client.set(name, value)


async def fail(_: Redis) -> None:
    """A use whose connection breaks before anything is waited for."""
    raise redis.ConnectionError("broken")


async def refused(asked: Awaitable[Any]) -> float:
    """How many seconds it took to fail."""
    started = time.monotonic()
    with pytest.raises(StoreDown):
        await asked
    return time.monotonic() - started


@asynccontextmanager
async def asked(
    url: str, changes: list[bool] | None = None, *, timeout_s: float = PATIENCE_S
) -> AsyncIterator[RedisServer]:
    """A server whose tasks and connections are counted when it is closed."""
    before = our_tasks()
    heard = (lambda up, _: changes.append(up)) if changes is not None else None
    async with RedisServer(url, timeout_s=timeout_s, on_change=heard) as server:
        yield server
        await until(lambda: not server._pending)
    await until(lambda: our_tasks() <= before)


async def answered(server: RedisServer, use: Callable[[Redis], Awaitable[Any]]) -> Any:
    """What it says as soon as it says something."""
    while True:
        with suppress(StoreDown):
            return await server.call(use)
        await asyncio.sleep(0.01)


async def connected(server: RedisServer) -> None:
    """All its connections are made: under a fault that would be what takes long."""
    await asyncio.gather(*(server.call(getting("x")) for _ in range(16)))


def through(proxy: TcpProxy) -> str:
    """The URL of what is behind it."""
    return f"redis://{HOST}:{proxy.port}/0"


def as_cluster(valkey: ValkeyProcess) -> str:
    """The URL of a cluster of one."""
    return f"redis+cluster://{HOST}:{valkey.port}"


@contextmanager
def silence(how: str, valkey: ValkeyProcess, proxy: TcpProxy) -> Iterator[None]:
    """Nothing is answered in time: the server is frozen, the link deaf, or each answer takes 400 ms."""
    if how == "frozen":
        valkey.freeze()
    proxy.black_hole, proxy.latency_s = how == "deaf", 0.2 if how == "slow" else 0.0
    yield
    if how == "frozen":
        valkey.thaw()
    proxy.black_hole, proxy.latency_s = False, 0.0


@pytest.mark.parametrize("how", ["frozen", "deaf", "slow"])
async def test_a_server_that_does_not_answer_costs_a_tenth_of_a_second_and_then_nothing(
    own_valkey: ValkeyProcess, how: str, lag: Callable[[], float]
) -> None:
    """Three calls end in time, what waits beside them ends with the third, the next fail at once; soon all is well."""
    changes: list[bool] = []
    async with TcpProxy(own_valkey.port) as proxy, asked(through(proxy), changes, timeout_s=0.1) as server:
        await answered(server, setting("x", "kept"))
        with silence(how, own_valkey, proxy):
            async with asyncio.TaskGroup() as group:
                first = [group.create_task(refused(server.call(getting("x")))) for _ in range(3)]
                await asyncio.sleep(0.05)
                beside = [group.create_task(refused(server.call(getting("x")))) for _ in range(100)]
            assert max(task.result() for task in first) <= LONGEST_S + lag()
            assert max(task.result() for task in beside) <= LONGEST_S - 0.05 + lag()
            assert max([await refused(server.call(getting("x"))) for _ in range(100)]) <= 0.01 + lag()
        assert await until(lambda: server.up) <= BACK_S + lag()
        assert await answered(server, getting("x")) == b"kept"
    assert changes[:2] == [False, True]


async def test_a_server_that_is_gone_is_used_again_when_it_is_back(
    own_valkey: ValkeyProcess, lag: Callable[[], float]
) -> None:
    """Killed: refused soon, and after three times at once; restarted, and empty: used within a second."""
    changes: list[bool] = []
    async with asked(own_valkey.url, changes, timeout_s=0.1) as server:
        await answered(server, setting("x", "forgotten"))
        own_valkey.kill()
        assert max([await refused(server.call(getting("x"))) for _ in range(4)]) <= LONGEST_S + lag()
        assert not server.up
        own_valkey.start()
        assert await until(lambda: server.up) <= BACK_S + lag()
        assert await answered(server, getting("x")) is None
    assert changes[:2] == [False, True]


async def test_a_call_just_made_when_the_server_goes_down_ends_too(redis_url: str) -> None:
    """Of many made at one moment the third failure is everybody's, begun or not."""
    async with asked(redis_url) as server, asyncio.timeout(1):
        ended = await asyncio.gather(*(server.call(fail) for _ in range(20)), return_exceptions=True)
        assert [type(each) for each in ended] == [StoreDown] * 20
        assert not server.up


async def test_a_process_that_is_held_up_itself_does_not_blame_the_server(redis_url: str) -> None:
    """Answers that came while the loop stood still are answers, however long that took."""
    changes: list[bool] = []
    async with asked(redis_url, changes, timeout_s=0.1) as server:
        await asyncio.gather(*(server.call(setting(f"{number}", f"{number}")) for number in range(16)))
        for _ in range(5):
            calls = [asyncio.create_task(server.call(getting(f"{number}"))) for number in range(16)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(0.25)  # noqa: ASYNC251 — that is what is tried
            assert await asyncio.gather(*calls) == [b"%d" % number for number in range(16)]
    assert not changes


async def test_calls_that_wait_for_a_connection_say_nothing_about_the_server(valkey: ValkeyProcess) -> None:
    """More than can be answered in time: who comes too late is refused, and everybody else is answered."""
    changes: list[bool] = []
    async with TcpProxy(valkey.port) as proxy, asked(through(proxy), changes, timeout_s=0.4) as server:
        await connected(server)
        proxy.latency_s = 0.12
        ended = await asyncio.gather(*(server.call(getting("x")) for _ in range(100)), return_exceptions=True)
        assert sum(each is None for each in ended) >= 8
        assert sum(isinstance(each, StoreDown) for each in ended) >= 16
    assert changes == []


async def test_a_reset_in_the_middle_fails_those_on_the_way_and_nobody_else(valkey: ValkeyProcess) -> None:
    """At once, for one connection; the next call has a new one."""
    async with TcpProxy(valkey.port) as proxy, asked(through(proxy)) as server:
        await server.call(setting("x", "kept"))
        proxy.latency_s = 0.04
        call = asyncio.ensure_future(refused(server.call(getting("x"))))
        await asyncio.sleep(0.02)
        proxy.cut()
        assert await call <= PATIENCE_S / 2
        proxy.latency_s = 0.0
        assert server.up
        assert await server.call(getting("x")) == b"kept"


async def test_a_call_whose_reply_is_lost_is_not_made_twice(valkey: ValkeyProcess) -> None:
    """Each is counted once or not at all, and surely once if it was answered."""
    async with TcpProxy(valkey.port) as proxy, asked(through(proxy)) as server:
        await server.call(setting("counted", "0"))
        proxy.drop_reply(20)
        answered = 0
        for _ in range(200):
            with suppress(StoreDown):
                await server.call(lambda client: client.incr("counted"))
                answered += 1
        proxy.drop_reply(0)
        counted = int(await server.call(getting("counted")) or 0)
    assert 100 <= answered < counted <= 200


async def test_nobody_ever_gets_the_reply_to_another(valkey: ValkeyProcess) -> None:
    """A thousand callers on few connections, many cancelled, many cut off by a link that hangs: each its own answer."""
    rng, fates = random.Random(3), Counter[str]()
    async with TcpProxy(valkey.port) as proxy, asked(through(proxy), timeout_s=0.4) as server:
        await server.call(lambda client: client.mset({f"name-{number}": f"name-{number}" for number in range(200)}))

        async def ask(name: str) -> None:
            try:
                fates["right" if await server.call(getting(name)) == name.encode() else "wrong"] += 1
            except StoreDown:
                fates["failed"] += 1
            except asyncio.CancelledError:
                fates["left"] += 1
                raise

        for _ in range(3):
            await connected(server)
            proxy.jitter_s = 0.004
            async with asyncio.TaskGroup() as group:
                for number in range(200):
                    task = group.create_task(ask(f"name-{number}"))
                    if rng.random() < 0.4:
                        asyncio.get_running_loop().call_later(rng.uniform(0, 0.03), task.cancel)
                await asyncio.sleep(0.03)
                proxy.latency_s = 0.3
            proxy.latency_s = proxy.jitter_s = 0.0
            for number in range(100):
                assert await answered(server, getting(f"name-{number}")) == f"name-{number}".encode()
    assert fates["wrong"] == 0
    assert min(fates[fate] for fate in ("right", "failed", "left")) >= 5, fates


# ── a server that has changed its mind ──────────────────────────────────────────────────────────────────────────────


async def test_scripts_that_are_forgotten_are_sent_again_and_no_call_fails(valkey: ValkeyProcess) -> None:
    """However often they are flushed, every call gets its own answer."""
    script = Echo()
    async with asked(valkey.url) as server:

        async def load(caller: int) -> list[Any]:
            return [await server.run(script, ["k"], [f"{caller}-{turn}"]) for turn in range(50)]

        async def flush() -> None:
            for _ in range(30):
                await server.call(lambda client: client.script_flush())

        *answers, _ = await asyncio.gather(*(load(caller) for caller in range(8)), flush())
    assert answers == [[f"{caller}-{turn}".encode() for turn in range(50)] for caller in range(8)]


async def test_who_may_not_run_scripts_is_told_so_until_it_may(
    own_valkey: ValkeyProcess, lag: Callable[[], float]
) -> None:
    """A refusal is a failure like others: named, counted, and over within a second after it was lifted."""
    with redis.Redis.from_url(own_valkey.url) as client:
        async with asked(own_valkey.url) as server:
            client.execute_command("ACL SETUSER default -@scripting")
            with pytest.raises(StoreDown, match="NoPermissionError"):
                await server.run(Echo(), ["k"], ["x"])
            for _ in range(2):
                await refused(server.run(Echo(), ["k"], ["x"]))
            assert not server.up
            client.execute_command("ACL SETUSER default +@scripting")
            assert await until(lambda: server.up) <= BACK_S + lag()
            assert await server.run(Echo(), ["k"], ["x"]) == b"x"


async def test_after_a_failover_the_new_leader_is_found(own_valkey: ValkeyProcess) -> None:
    """Its name leads elsewhere; whoever still has a connection to the old one is told READONLY, once."""
    with ValkeyProcess(replica_of=own_valkey) as other:
        async with TcpProxy(own_valkey.port) as proxy, asked(through(proxy)) as server:
            await asyncio.gather(*(server.call(setting(f"before-{number}", "x")) for number in range(10)))
            with redis.Redis.from_url(other.url) as promoted, redis.Redis.from_url(own_valkey.url) as demoted:
                promoted.execute_command("REPLICAOF NO ONE")
                demoted.execute_command(f"REPLICAOF {HOST} {other.port}")
                proxy._server = (HOST, other.port)
                await refused(server.call(setting("after", "lost")))
                await asyncio.gather(*(server.call(setting(f"after-{number}", "x")) for number in range(10)))
                assert promoted.exists(*(f"after-{number}" for number in range(10))) == 10
            assert server.up


async def test_closing_ends_what_is_under_way(own_valkey: ValkeyProcess, lag: Callable[[], float]) -> None:
    """Callers that still wait are refused, whether the server is up or down; no task and no connection is left."""
    for down in (False, True):
        before = our_tasks()
        async with RedisServer(own_valkey.url, timeout_s=0.5) as server:
            await server.call(setting("x", "y"))
            own_valkey.freeze()
            if down:
                await asyncio.gather(*(refused(server.call(getting("x"))) for _ in range(3)))
            waiting = [asyncio.ensure_future(refused(server.call(getting("x")))) for _ in range(20)]
            await asyncio.sleep(0)
        assert max(await asyncio.gather(*waiting)) <= SLACK_S + lag()
        assert our_tasks() == before
        await refused(server.call(getting("x")))
        own_valkey.thaw()
        with redis.Redis.from_url(own_valkey.url) as client:
            await until(lambda: len(client.client_list()) == 1)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster"])
async def test_no_error_tells_the_password(own_valkey: ValkeyProcess, scheme: str) -> None:
    """Wrong, refused, unreachable or spoken to in another protocol: no error, nor what is behind it, has it."""
    with redis.Redis.from_url(own_valkey.url) as client:
        client.config_set("requirepass", "another one")
    for port in (own_valkey.port, free_port()):
        async with RedisServer(f"{scheme}://:{PASSWORD}@{HOST}:{port}") as server:
            for _ in range(4):
                with pytest.raises(StoreDown) as raised:
                    await server.call(getting("x"))
                assert PASSWORD not in everything(raised.value) + repr(server)
    for wrong in ("?socket_timeout=soon", "?db=nine"):
        with pytest.raises(ValueError, match="in connection URL") as misread:
            RedisServer(f"{scheme}://:{PASSWORD}@{HOST}:1/{wrong}")
        assert PASSWORD not in everything(misread.value)


# ── a cluster ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_cluster_takes_many_calls_at_once(valkey_cluster: ValkeyProcess) -> None:
    """They share its connections, as with a lone server."""
    async with asked(as_cluster(valkey_cluster)) as server:
        await connected(server)
        names = [f"name-{number}" for number in range(100)]
        await asyncio.gather(*(server.call(setting(name, name)) for name in names))
        answers = await asyncio.gather(*(server.call(getting(name)) for name in names))
        assert answers == [name.encode() for name in names]
        assert server.up


async def test_a_cluster_that_is_not_there_is_down_until_it_is(lag: Callable[[], float]) -> None:
    """Its absence is a failure like others, and it is found within a second."""
    with ValkeyProcess(cluster=True) as cluster:
        cluster.kill()
        async with asked(as_cluster(cluster), timeout_s=0.1) as server:
            assert max([await refused(server.call(getting("x"))) for _ in range(4)]) <= LONGEST_S + lag()
            assert not server.up
            await asyncio.to_thread(cluster.start)
            assert await until(lambda: server.up) <= BACK_S + lag()
            assert await answered(server, getting("x")) is None


async def test_quotas_shares_and_vectors_live_in_a_cluster(valkey_cluster: ValkeyProcess) -> None:
    """Each account's keys are in one slot, values of one request in many."""
    entries = [(number.to_bytes(32, "big"), b"value %d" % number) for number in range(600)]
    limits = {"only": Limits(max_in_flight=1)}
    async with asked(as_cluster(valkey_cluster)) as server:
        level = RedisLevel(server, ttl_s=60)
        await level.write(SPACE, entries)
        assert await level.read(SPACE, [key for key, _ in [*entries, (b"missing", b"")]]) == dict(entries)
        await level.delete(SPACE, [key for key, _ in entries[:300]])
        assert await level.read(SPACE, [key for key, _ in entries]) == dict(entries[300:])
        assert (await level.stats()).entries >= 300
        assert await level.maxmemory_warning(holds_limiter=True) is None
        wish = Claim("only", 1, 1, Priority.DEFAULT)
        async with (
            RedisLimiter(server, limits, replica="a", max_replicas=2) as one,
            RedisLimiter(server, limits, replica="b", max_replicas=2) as other,
        ):
            granted = await one.reserve(wish)
            assert isinstance(granted, Grant)
            assert not isinstance(await other.reserve(wish), Grant)
            await one.settle(granted, 1)
            await until(lambda: not one._accounts["only"].settling)
            assert isinstance(await other.reserve(wish), Grant)
        mine, yours = RedisShares(server, "a"), RedisShares(server, "b")
        assert [await mine.exchange({}), await yours.exchange({})] == [[], []]
        served = {"queue": Served({"tenant": 1.0})}
        await mine.exchange(served)
        assert await yours.exchange({}) == [served]
        assert server.up


async def test_a_connection_that_was_closed_meanwhile_is_the_servers_failure(redis_url: str) -> None:
    """The loop says so with a RuntimeError: it must not end what else the process does."""

    async def use(_: object) -> None:
        raise RuntimeError("unable to perform operation; the handler is closed")

    async with RedisServer(redis_url) as server:
        for _ in range(3):
            with pytest.raises(StoreDown, match=r"RuntimeError|down"):
                await server.call(use)
        await until(lambda: server.up and not server.doubted)
        assert await server.call(lambda client: client.ping())
