"""Hides one provider's HTTP: its connection pool, whole-call time-outs, bounded bodies, what lost exchanges mean."""

import asyncio
import functools
import ssl
from collections.abc import AsyncIterator, Mapping

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from app.errors import CallTimeout, ConfigurationError, MalformedReply, ProviderError, Transient, Unreachable
from app.providers.refusals import Answer

_CONNECT_S = 5.0
_KEEP_ALIVE_S = 30.0
_PIECE_BYTES = 2**18
_MOST_ERROR_BYTES = 2**16


class Endpoint:
    """Posts JSON to one provider over at most `max_connections` kept-alive connections.

    Nothing of the environment (proxies, netrc) is used, redirects are not followed, nothing is retried and cookies
    are not kept. `headers` go with every call. Raises ConfigurationError for headers that HTTP cannot carry.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str], *, max_connections: int) -> None:
        for name, value in headers.items():
            if not (value.isascii() and value.isprintable()):
                raise ConfigurationError(f"the value of the header `{name}` has characters that HTTP cannot carry")
        self._max_connections = max_connections
        self._url = functools.cache(httpx.URL(base_url.rstrip("/") + "/").join)
        self._headers = {
            "user-agent": "embedgate", "accept-encoding": "identity", "content-type": "application/json", **headers
        }  # fmt: skip
        self._transport = AiohttpTransport(verify=_tls(), trust_env=False, client=self._open_session)

    async def post(self, path: str, body: bytes, *, most_bytes: int, timeout_s: float) -> Answer:
        """One exchange, complete within `timeout_s`; raises ProviderErrors for what brings no answer.

        A 2xx longer than `most_bytes` or compressed although that was not asked is a MalformedReply.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(path, body, most_bytes)
        except (httpx.TransportError, aiohttp.ClientError) as error:
            raise _translated(error) from None
        except TimeoutError:
            raise CallTimeout(f"no complete answer within {timeout_s:.3g} s") from None
        except OSError as error:
            raise _translated(error) from None

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._transport.aclose()

    async def _exchange(self, path: str, body: bytes, most_bytes: int) -> Answer:
        # The transport without the client around it, whose redirects, cookies and proxies we do not want: they took a
        # third of a small call. Both a content-length and pieces, since a large body in one piece holds the loop.
        request = httpx.Request(
            "POST",
            self._url(path),
            headers={**self._headers, "content-length": str(len(body))},
            content=_pieces(body),
            extensions={"timeout": {"connect": _CONNECT_S}},
        )
        response = await self._transport.handle_async_request(request)
        try:
            if not response.is_success:
                return Answer(response.status_code, response.headers, await _head(response, _MOST_ERROR_BYTES))
            if response.headers.get("content-encoding", "identity") != "identity":
                raise MalformedReply("a compressed reply, which was not asked for")
            content = await _head(response, most_bytes + 1)
            if len(content) > most_bytes:
                raise MalformedReply(f"a reply of more than {most_bytes} bytes")
            return Answer(response.status_code, response.headers, content)
        finally:
            await response.aclose()

    def _open_session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=self._max_connections, ssl=_tls(), keepalive_timeout=_KEEP_ALIVE_S)
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all endpoints: the certificates take longer to read than all else together."""
    return httpx.create_ssl_context(trust_env=False)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _PIECE_BYTES):
        yield body[start : start + _PIECE_BYTES]


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
    if isinstance(cause, aiohttp.ClientResponseError):
        return MalformedReply(f"an answer that is no HTTP: {name}")
    return Transient(f"the connection broke: {name}")
