"""Hides how a Redis or Valkey server is called so that it can never hold anybody up: briefly, once, or not at all."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha1
from importlib import resources
from typing import Any, Self, TypeVar, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import (
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

_T = TypeVar("_T")

_FAILURES = 3  # in a row, then nobody is kept waiting any more
_GRACE = 0.2  # the last part of a call's time, which begins late where this process was late itself
_PROBE_S = 0.3
_CONNECTIONS = 8  # a burst waits for its turn on few sooner than many are opened
_CLUSTER = "redis+cluster://", "rediss+cluster://"
# TimeoutError is an OSError; RuntimeError is what uvloop says of a connection that was closed meanwhile.
_FOREIGN = (RedisError, RedisClusterException, OSError, RuntimeError)


class StoreDown(Exception):
    """The server cannot be asked now, or did not answer in time; without its address."""


class Script:
    """A Lua file of `app/storage`, run where the keys are."""

    def __init__(self, name: str) -> None:
        self.text = resources.files(__package__).joinpath(f"{name}.lua").read_text("utf-8")
        self.sha1 = sha1(self.text.encode(), usedforsecurity=False).hexdigest()


class RedisServer:
    """One server or cluster; an async context manager that owns its connections and whatever is under way on them.

    A call takes at most `timeout_s` and is never made twice, for nobody can tell whether it was carried out. When one
    fails the server is asked at once whether it is there. After three failures in a row it counts as down: all that
    waits for it fails at once, as does whatever comes, until a probe is answered. Callers that are cancelled stop
    waiting; what they sent is read to its end.

    `url` is what redis-py takes, or `redis+cluster://`; `on_change` hears `up` and why.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 0.1, on_change: Callable[[bool, str], None] | None = None
    ) -> None:  # fmt: skip
        self._client = _client(url, timeout_s)
        self._timeout_s = timeout_s
        self._on_change = on_change
        self._failures = 0
        self._closing = False
        self._tasks = asyncio.TaskGroup()
        self._pending: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_CONNECTIONS)  # a cluster's client refuses where a lone server's would wait
        self._watching: asyncio.Task[None] | None = None
        self.up = True
        """Whether it is worth asking."""
        self.doubted = False
        """Whether the last call went unanswered, so that who can do without would rather not ask."""
        self.up_since = -float("inf")
        """When it came back, on the monotonic clock."""

    async def __aenter__(self) -> Self:
        """Opens its connections, as far as it can: the first burst shall not have to."""
        await self._tasks.__aenter__()
        openings = (self.call(lambda client: client.ping()) for _ in range(_CONNECTIONS))
        await asyncio.gather(*openings, return_exceptions=True)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing, self.up = True, False
        self._abandon()
        if self._watching is not None:
            self._watching.cancel()
        await self._tasks.__aexit__(None, None, None)
        with suppress(*_FOREIGN):
            await self._client.aclose()

    async def call(self, use: Callable[[Redis], Awaitable[_T]]) -> _T:
        """What `use` gets from the client. Raises StoreDown."""
        if not self.up:
            raise StoreDown("down")
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        task = self._tasks.create_task(self._use(use, answer))
        self._pending.add(task)

        def ended(_: object) -> None:
            self._pending.discard(task)
            _fail(answer, "abandoned")  # unless there is one; a task may be cancelled before it begins

        task.add_done_callback(ended)
        return await answer

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[bytes | str | int]) -> Any:
        """What `script` returns. Raises StoreDown. A server that does not know the script is sent it, at once."""

        async def use(client: Redis) -> Any:
            try:
                return await client.evalsha(script.sha1, len(keys), *keys, *arguments)
            except NoScriptError:
                return await client.eval(script.text, len(keys), *keys, *arguments)

        return await self.call(use)

    async def _use(self, use: Callable[[Redis], Awaitable[_T]], answer: asyncio.Future[_T]) -> None:
        """Never raises: what it is in belongs to everybody."""
        left_s = 0.0
        try:
            async with _patience(self._timeout_s) as until_s, self._slots:
                left_s = until_s - asyncio.get_running_loop().time()
                result = await use(self._client)
        except _FOREIGN as error:
            _fail(answer, type(error).__name__)
            if left_s > self._timeout_s / 2:  # who waited longer for its turn says nothing about the server
                await self._failed(error)
        except Exception as bug:
            if not answer.done():
                answer.set_exception(bug)
        else:
            self._succeeded()
            if not answer.done():
                answer.set_result(result)

    def _succeeded(self) -> None:
        self._failures, self.doubted = 0, False

    async def _failed(self, error: Exception) -> None:
        self._failures += 1
        self.doubted |= not isinstance(error, ResponseError)
        if self.up and self._failures >= _FAILURES:
            self._turn(up=False, reason=type(error).__name__)
            self._abandon()
        idle = self._watching is None or self._watching.done()
        if idle and not self._closing and (self.doubted or not self.up):
            self._watching = self._tasks.create_task(self._watch())
        if isinstance(error, ReadOnlyError | Disconnected) and isinstance(self._client, Redis):
            with suppress(*_FOREIGN):  # the name may lead elsewhere now, and what one connection met all may have met
                await self._client.connection_pool.disconnect(inuse_connections=False)

    def _abandon(self) -> None:
        current = asyncio.current_task()
        for task in [*self._pending]:
            if task is not current:
                task.cancel()

    async def _watch(self) -> None:
        """Asks a server that failed until it answers: at once, and now and then when it is down."""
        while not self._closing and (self.doubted or not self.up):
            if not self.up:
                await asyncio.sleep(_PROBE_S)
            try:
                async with _patience(self._timeout_s):
                    await self._client.ping()
            except _FOREIGN as error:
                await self._failed(error)
                continue
            self._succeeded()
            if not self.up:
                self.up_since = time.monotonic()
                self._turn(up=True, reason="answered")

    def _turn(self, *, up: bool, reason: str) -> None:
        self.up = up
        if self._on_change is not None:
            self._on_change(up, reason)


@asynccontextmanager
async def _patience(timeout_s: float) -> AsyncIterator[float]:
    """So long for what is inside; when that is over, on the loop's clock.

    A timer that is due at the same time as an answer goes first when the loop was held up. So the last part of the time
    begins only when the loop gets there: what has arrived by then is no failure of the server's.
    """
    loop, grace_s = asyncio.get_running_loop(), timeout_s * _GRACE
    async with asyncio.timeout(None) as timer:
        due = loop.call_later(timeout_s - grace_s, lambda: timer.reschedule(loop.time() + grace_s))
        try:
            yield loop.time() + timeout_s
        finally:
            due.cancel()


def _client(url: str, timeout_s: float) -> Redis:
    options: dict[str, Any] = {
        "socket_timeout": 2 * timeout_s,  # never first: it does not know whether the loop was held up
        "socket_connect_timeout": 2 * timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": _CONNECTIONS,
    }
    if url.startswith(_CLUSTER):
        cluster = RedisCluster.from_url(url.replace("+cluster", "", 1), **options)
        return cast("Redis", cluster)
    pool = BlockingConnectionPool.from_url(url, retry_on_error=[], timeout=2 * timeout_s, **options)
    return Redis.from_pool(pool)


def _fail(answer: asyncio.Future[Any], reason: str) -> None:
    if not answer.done():
        answer.set_exception(StoreDown(reason))
