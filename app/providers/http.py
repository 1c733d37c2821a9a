"""Hides one provider's HTTP: its connection pool, time-outs, proxies, bounded bodies, what lost exchanges mean."""

import asyncio
import functools
import ssl
import time
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import aiohttp
import httpx
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from httpx_aiohttp import AiohttpTransport

from app.errors import BrokenOff, CallTimeout, ConfigurationError, MalformedReply, ProviderError, Unreachable
from app.providers.refusals import Answer

_KEEP_ALIVE_S = 30.0
_PIECE_BYTES = 2**18
_MOST_ERROR_BYTES = 2**16


OnOpened: TypeAlias = Callable[[float], None]
"""Told of each connection that was opened for an exchange how many seconds the exchange waited for it."""


class Pool(NamedTuple):
    """The connections to one provider now; `waiting` are exchanges that have none yet."""

    busy: int
    idle: int
    waiting: int


class Upload(NamedTuple):
    """A body that is made while it is sent, its exact size, and the headers that it needs."""

    pieces: AsyncIterator[bytes]
    size_bytes: int
    headers: Mapping[str, str]


class Endpoint:
    """Exchanges JSON and files with one provider over at most `max_connections` kept-alive connections.

    Redirects are not followed, nothing is retried and cookies are not kept. Nothing of the environment is used, except
    its proxies (as they are now) with `proxy_from_environment`. `headers` go with every call. `connect_timeout_s` is
    for a connection with its TLS, `read_timeout_s` for the provider's silence. Raises ConfigurationError for headers
    that HTTP cannot carry and proxies that cannot be used. `version` is the last part of the base URL's path.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        max_connections: int,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float | None = None,
        proxy_from_environment: bool = False,
        on_opened: OnOpened = lambda wait_s: None,
    ) -> None:
        for name, value in headers.items():
            if not (value.isascii() and value.isprintable()):
                raise ConfigurationError(f"the value of the header `{name}` has characters that HTTP cannot carry")
        self._max_connections = max_connections
        self._timeouts = {"connect": connect_timeout_s, "read": read_timeout_s}
        self._proxy = _proxy(base_url) if proxy_from_environment else None
        self._on_opened = on_opened
        self._connector: _Connector | None = None
        self._exchanges = 0
        base = httpx.URL(base_url.rstrip("/") + "/")
        self.version = base.path.rstrip("/").rpartition("/")[2]
        self._url = functools.lru_cache(64)(base.join)
        self._headers = {
            "user-agent": "embedgate", "accept-encoding": "identity", "content-type": "application/json", **headers
        }  # fmt: skip
        self._transport = AiohttpTransport(verify=_tls(), trust_env=False, client=self._open_session)

    async def post(self, path: str, body: bytes, *, most_bytes: int, timeout_s: float) -> Answer:
        """One exchange, complete within `timeout_s`; raises ProviderErrors for what brings no answer.

        A 2xx longer than `most_bytes` or compressed although that was not asked is a MalformedReply.
        """
        return await self.send(path, Upload(_pieces(body), len(body), {}), most_bytes=most_bytes, timeout_s=timeout_s)

    async def send(self, path: str, upload: Upload, *, most_bytes: int, timeout_s: float) -> Answer:
        """Posts any body; see `post`."""
        # Both a content-length and pieces, since a large body in one piece holds the loop.
        headers = {**self._headers, **upload.headers, "content-length": str(upload.size_bytes)}
        request = self._request("POST", path, headers, upload.pieces)
        async with self._guarded(timeout_s):
            return await self._answer(request, most_bytes)

    async def get(self, path: str, *, most_bytes: int, timeout_s: float) -> Answer:
        """Fetches something small; see `post`."""
        async with self._guarded(timeout_s):
            return await self._answer(self._request("GET", path, self._headers), most_bytes)

    async def download(
        self, path: str, *, most_bytes: int, refusal: Callable[[Answer], ProviderError]
    ) -> AsyncGenerator[bytes, None]:
        """The body of a 2xx in the pieces in which it comes; raises what `refusal` makes of anything else, see `post`.

        Bounded in time by the provider's silence only.
        """
        request = self._request("GET", path, self._headers)
        async with self._guarded(None), self._opened(request) as response:
            if not response.is_success:
                raise refusal(await _refused(response))
            size_bytes = 0
            async for piece in response.aiter_raw():
                size_bytes += len(piece)
                if size_bytes > most_bytes:
                    raise MalformedReply(f"a reply of more than {most_bytes} bytes")
                yield piece

    def pool(self) -> Pool:
        """The connections now."""
        connector = self._connector
        if connector is None:
            return Pool(0, 0, self._exchanges)
        busy = self._exchanges - connector.waiting
        return Pool(busy, max(0, len(connector.open) - busy), connector.waiting)

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._transport.aclose()

    def _request(
        self, method: str, path: str, headers: Mapping[str, str], body: AsyncIterator[bytes] | None = None
    ) -> httpx.Request:
        extensions = {"timeout": self._timeouts}
        return httpx.Request(method, self._url(path), headers=headers, content=body, extensions=extensions)

    @asynccontextmanager
    async def _guarded(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Counts an exchange, bounds it, and translates what becomes of it."""
        self._exchanges += 1
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except (httpx.TransportError, aiohttp.ClientError) as error:
            raise _translated(error) from None
        except TimeoutError:
            within = "in time" if timeout_s is None else f"within {timeout_s:.3g} s"
            raise CallTimeout(f"no complete answer {within}") from None
        except OSError as error:
            raise _translated(error) from None
        finally:
            self._exchanges -= 1

    @asynccontextmanager
    async def _opened(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        # The transport without the client around it, whose redirects, cookies and proxies we do not want: they took a
        # third of a small call.
        response = await self._transport.handle_async_request(request)
        try:
            if response.status_code == 407:
                raise Unreachable("the proxy refused: HTTP 407")
            if response.is_success and response.headers.get("content-encoding", "identity") != "identity":
                raise MalformedReply("a compressed reply, which was not asked for")
            yield response
        finally:
            await response.aclose()

    async def _answer(self, request: httpx.Request, most_bytes: int) -> Answer:
        async with self._opened(request) as response:
            if not response.is_success:
                return await _refused(response)
            content = await _head(response, most_bytes + 1)
            if len(content) > most_bytes:
                raise MalformedReply(f"a reply of more than {most_bytes} bytes")
            return Answer(response.status_code, response.headers, content)

    def _open_session(self) -> aiohttp.ClientSession:
        self._connector = _Connector(
            self._on_opened, limit=self._max_connections, ssl=_tls(), keepalive_timeout=_KEEP_ALIVE_S
        )
        # Its own trust_env would read .netrc too, at every call.
        return aiohttp.ClientSession(
            connector=self._connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, proxy=self._proxy
        )


class _Connector(aiohttp.TCPConnector):
    """A pool that knows who waits for a connection and which connections are open."""

    def __init__(self, on_opened: OnOpened, **options: Any) -> None:
        super().__init__(**options)
        self._on_opened = on_opened
        self.waiting = 0
        self.open: set[object] = set()

    async def connect(self, *args: Any, **options: Any) -> Connection:
        """See `aiohttp.BaseConnector`."""
        started_s = time.perf_counter()
        self.waiting += 1
        try:
            connection = await super().connect(*args, **options)
        finally:
            self.waiting -= 1
        if connection.protocol not in self.open:
            self._note(connection.protocol)
            self._on_opened(time.perf_counter() - started_s)
        return connection

    def _note(self, protocol: ResponseHandler | None) -> None:
        """Counts a connection until it is closed."""

        def forget(closed: asyncio.Future[None]) -> None:
            self.open.discard(protocol)
            closed.cancelled() or closed.exception()  # unless it is retrieved, the loop complains

        if protocol is not None and protocol.closed is not None:
            self.open.add(protocol)
            protocol.closed.add_done_callback(forget)


def _proxy(base_url: str) -> str | None:
    """The environment's proxy for this URL; None where it names none, or says that none is to be used."""
    parts = urlsplit(base_url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None
    try:
        named = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        sound = named.scheme in {"http", "https"} and bool(named.hostname) and named.port != 0
    except ValueError:
        sound = False
    if not sound:  # not shown, since it may hold a password
        raise ConfigurationError(f"the environment's {parts.scheme}_proxy is not the URL of an HTTP proxy")
    return named.geturl()


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all endpoints: the certificates take longer to read than all else together."""
    return httpx.create_ssl_context(trust_env=False)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _PIECE_BYTES):
        yield body[start : start + _PIECE_BYTES]


async def _refused(response: httpx.Response) -> Answer:
    return Answer(response.status_code, response.headers, await _head(response, _MOST_ERROR_BYTES))


async def _head(response: httpx.Response, most_bytes: int) -> bytearray:
    """The first `most_bytes` of the body, or all of it; one growing buffer, since joining pieces takes a copy more."""
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) >= most_bytes:
            del content[most_bytes:]
            break
    return content


def _translated(error: Exception) -> ProviderError:
    """What a lost exchange means; the transport calls every lost connection a connect time-out, so its cause counts."""
    cause = error.__cause__ if isinstance(error, httpx.TransportError) else error
    name = type(cause).__name__
    if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Unreachable(f"no connection: {name}")
    if isinstance(cause, aiohttp.ClientHttpProxyError):
        return Unreachable(f"the proxy refused: HTTP {cause.status}")
    if isinstance(cause, aiohttp.SocketTimeoutError):
        return CallTimeout("the provider fell silent")
    if isinstance(cause, aiohttp.ClientResponseError):
        return MalformedReply(f"an answer that is no HTTP: {name}")
    return BrokenOff(f"the connection broke: {name}")
