"""The proxy and the servers that other tests break do break in the way that they say."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from tests.servers import HOST, PostgresProcess, ValkeyProcess, free_port
from tests.tcp_proxy import TcpProxy

SOON_S = 5.0
SILENCE_S = 0.1


class Echo:
    """A server that answers what it gets, and remembers it."""

    def __init__(self) -> None:
        self.heard = b""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the client ends or is reset."""
        try:
            while said := await reader.read(65_536):
                self.heard += said
                writer.write(said)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


class Client:
    """A plain asyncio client that waits for no answer longer than `SOON_S`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, said: bytes) -> None:
        """Without waiting."""
        self._writer.write(said)

    async def hear(self, size_bytes: int, within_s: float = SOON_S) -> bytes:
        """Exactly so much."""
        async with asyncio.timeout(within_s):
            return await self._reader.readexactly(size_bytes)

    async def ask(self, said: bytes) -> bytes:
        """Its echo."""
        self.send(said)
        return await self.hear(len(said))

    def close(self) -> None:
        """Whatever state it is in."""
        self._writer.close()

    def end(self) -> None:
        """Says that it will send no more."""
        self._writer.write_eof()


class Link:
    """An echo server behind a proxy, and its clients."""

    def __init__(self, proxy: TcpProxy, echo: Echo) -> None:
        self.proxy, self.echo = proxy, echo
        self.clients: list[Client] = []

    async def connect(self) -> Client:
        """A new client."""
        self.clients.append(Client(*await asyncio.open_connection(HOST, self.proxy.port)))
        return self.clients[-1]


@asynccontextmanager
async def echoing() -> AsyncIterator[Link]:
    """A link that leaves no task behind."""
    echo = Echo()
    server = await asyncio.start_server(echo.answer, HOST, 0)
    try:
        async with TcpProxy(server.sockets[0].getsockname()[1]) as proxy:
            link = Link(proxy, echo)
            yield link
            for client in link.clients:
                client.close()
    finally:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others), SOON_S)


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    """An echo server behind a proxy without faults."""
    async with echoing() as built:
        yield built


def now_s() -> float:
    """The loop's clock."""
    return asyncio.get_running_loop().time()


async def test_a_proxy_without_faults_changes_nothing(link: Link) -> None:
    """A megabyte comes back as it went, both ends see the other's end, and the counters know it."""
    client, said = await link.connect(), bytes(range(256)) * 4096
    assert await client.ask(said) == said
    client.end()
    with pytest.raises(asyncio.IncompleteReadError):
        await client.hear(1)
    assert (link.proxy.connections, link.proxy.bytes_in, link.proxy.bytes_out) == (1, len(said), len(said))


async def test_latency_holds_in_each_direction_but_not_for_each_chunk(link: Link) -> None:
    """A round trip takes twice the latency, and so do twenty requests that do not wait for each other."""
    link.proxy.latency_s = 0.1
    client, begun_s = await link.connect(), now_s()
    for _ in range(20):
        client.send(b"ping")
        await asyncio.sleep(0)
    assert await client.hear(80) == b"ping" * 20
    assert 0.2 <= now_s() - begun_s < 1.0


async def test_jitter_keeps_the_order(link: Link) -> None:
    """Two hundred chunks, each with a delay of its own, arrive as they were sent."""
    link.proxy.jitter_s = 0.02
    client, said = await link.connect(), b""
    for number in range(200):
        said += b"%03d" % number
        client.send(said[-3:])
        await asyncio.sleep(0)
    assert await client.hear(len(said)) == said


async def test_bandwidth_is_a_bound(link: Link) -> None:
    """20 kB up and the same down at 100 kB/s cannot take less than 0.2 s each."""
    link.proxy.bandwidth_bytes_s = 100_000
    client, begun_s = await link.connect(), now_s()
    await client.ask(b"x" * 20_000)
    assert now_s() - begun_s >= 0.4


async def test_a_black_hole_swallows_old_and_new_connections(link: Link) -> None:
    """Nothing is heard on either side; when it ends, what lost bytes is reset and the rest goes on."""
    old, quiet = await link.connect(), await link.connect()
    assert await old.ask(b"before") == await quiet.ask(b"before") == b"before"
    link.proxy.black_hole = True
    new = await link.connect()
    for client in (old, new):
        client.send(b"lost")
        with pytest.raises(TimeoutError):
            await client.hear(1, within_s=SILENCE_S)
    assert link.echo.heard == b"before" * 2
    link.proxy.black_hole = False
    for client in (old, new):
        with pytest.raises(ConnectionResetError):
            await client.hear(1)
    assert await quiet.ask(b"after") == await (await link.connect()).ask(b"after") == b"after"


async def test_a_refusing_proxy_resets_refuses_and_accepts_again(link: Link) -> None:
    """The open connection is reset and a new one refused, until connections are accepted again at the same port."""
    client = await link.connect()
    assert await client.ask(b"x") == b"x"
    link.proxy.refuse()
    with pytest.raises(ConnectionResetError):
        await client.hear(1)
    with pytest.raises(ConnectionRefusedError):
        await link.connect()
    link.proxy.accept()
    assert await (await link.connect()).ask(b"y") == b"y"


async def test_a_cut_resets_what_is_open_and_nothing_else(link: Link) -> None:
    """Both open connections are reset, and the next one is answered."""
    clients = [await link.connect(), await link.connect()]
    assert [await client.ask(b"x") for client in clients] == [b"x", b"x"]
    link.proxy.cut()
    for client in clients:
        with pytest.raises(ConnectionResetError):
            await client.hear(1)
    assert await (await link.connect()).ask(b"y") == b"y"


async def test_a_dropped_reply_belongs_to_a_request_that_arrived(link: Link) -> None:
    """Of nine requests every third is heard by the server, and its client is reset instead of answered."""
    link.proxy.drop_reply(every=3)
    client, answered = await link.connect(), []
    for number in range(9):
        try:
            answered.append(await client.ask(b"%d" % number))
        except ConnectionResetError:
            client = await link.connect()
    assert link.echo.heard == b"012345678"
    assert answered == [b"0", b"1", b"3", b"4", b"6", b"7"]
    link.proxy.drop_reply(every=0)
    assert [await client.ask(b"x") for _ in range(4)] == [b"x"] * 4


async def test_a_dead_server_resets_its_client() -> None:
    """Whoever connects to a proxy in front of nothing is accepted and then reset."""
    async with TcpProxy(free_port()) as proxy:
        reader, writer = await asyncio.open_connection(HOST, proxy.port)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), SOON_S)
        writer.close()


# ── servers to break ────────────────────────────────────────────────────────────────────────────────────────────────


def valkey_client(url: str, timeout_s: float = SOON_S) -> redis.asyncio.Redis:
    """One that tries once."""
    return redis.asyncio.Redis.from_url(url, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0))


async def test_a_frozen_valkey_is_silent_and_goes_on_after_the_thaw(own_valkey: ValkeyProcess) -> None:
    """A connection made before the freeze gets its answer after it; in between a client waits in vain."""
    reader, writer = await asyncio.open_connection(HOST, own_valkey.port)
    own_valkey.freeze()
    writer.write(b"PING\r\n")
    async with valkey_client(own_valkey.url, SILENCE_S) as client:
        with pytest.raises(redis.exceptions.TimeoutError):
            await client.ping()
    own_valkey.thaw()
    assert await asyncio.wait_for(reader.readline(), SOON_S) == b"+PONG\r\n"
    writer.close()


async def test_a_restarted_valkey_is_empty_at_the_same_place(own_valkey: ValkeyProcess) -> None:
    """A killed one refuses, a restarted one answers at the same URL and knows nothing, even if it was frozen."""
    async with valkey_client(own_valkey.url) as client:
        await client.set("key", "value")
        own_valkey.freeze()
        own_valkey.kill()
        with pytest.raises(redis.exceptions.ConnectionError):
            await client.get("key")
        own_valkey.start()
        assert await client.get("key") is None


@pytest.mark.parametrize("turn", ["first", "second"])
async def test_an_empty_redis_is_empty(redis_url: str, turn: str) -> None:
    """Nothing that another test wrote is there."""
    async with valkey_client(redis_url) as client:
        assert await client.dbsize() == 0
        await client.set("left by", turn)


async def test_a_cluster_refuses_keys_of_two_slots(valkey_cluster: ValkeyProcess) -> None:
    """One node answers for all slots, and CROSSSLOT when a command's keys do not share one."""
    async with valkey_client(valkey_cluster.url) as client:
        await client.mset({"{a}1": "x", "{a}2": "y"})
        with pytest.raises(ResponseError, match="same slot"):
            await client.mget("a", "b")


async def test_a_replica_has_what_its_leader_had() -> None:
    """A replica has caught up when it is started, and outlives its leader."""
    with ValkeyProcess({"maxmemory": "64mb"}) as leader:
        async with valkey_client(leader.url) as client:
            assert await client.config_get("maxmemory") == {"maxmemory": "67108864"}
            await client.set("key", "value")
        with ValkeyProcess(replica_of=leader) as replica:
            leader.kill()
            async with valkey_client(replica.url) as client:
                assert await client.get("key") == b"value"


async def test_a_frozen_postgres_is_silent_and_goes_on_after_the_thaw(own_postgres: PostgresProcess) -> None:
    """Neither an old nor a new connection is answered while it is frozen; the old one is afterwards."""
    old = await asyncpg.connect(own_postgres.url)
    own_postgres.freeze()
    waiting = asyncio.ensure_future(old.fetchval("SELECT 7"))
    with pytest.raises(TimeoutError):
        await asyncpg.connect(own_postgres.url, timeout=SILENCE_S)
    assert not waiting.done()
    own_postgres.thaw()
    assert await asyncio.wait_for(waiting, SOON_S) == 7
    await old.close()


async def test_a_killed_postgres_keeps_what_was_committed(own_postgres: PostgresProcess) -> None:
    """Its clients lose their connections, and find their rows when it is back at the same place."""
    url = own_postgres.new_database()
    old = await asyncpg.connect(url)
    await old.execute("CREATE TABLE kept AS SELECT 7 AS figure")
    own_postgres.restart()
    with pytest.raises((ConnectionError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
        await old.fetchval("SELECT 7")
    new = await asyncpg.connect(url)
    assert await new.fetchval("SELECT figure FROM kept") == 7
    own_postgres.drop(url)
    await asyncio.wait_for(old.close(), SOON_S)
    await new.close()


@pytest.mark.parametrize("turn", ["first", "second"])
async def test_a_fresh_postgres_database_is_empty(postgres_url: str, turn: str) -> None:
    """Each test has a database of its own."""
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f"CREATE TABLE left_by_a_test AS SELECT '{turn}'")
    await connection.close()


def test_each_kind_of_database_is_offered(database_url: str) -> None:
    """A test that asks for `database_url` runs on SQLite and on Postgres."""
    assert database_url.partition("://")[0] in ("sqlite", "postgresql")
