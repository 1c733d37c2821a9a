"""Hides how a multipart form is read as it comes: part by part, in any order, within bounds, nothing of it kept."""

import re
from collections.abc import AsyncIterator
from typing import Final, cast
from urllib.parse import unquote

from aiohttp import BodyPartReader, MultipartReader, StreamReader
from aiohttp.http_exceptions import HttpProcessingError
from starlette.requests import Request
from starlette.types import Receive

from app.api.errors import body_too_large, compressed_body
from app.api.exchange import CallerLeft
from app.errors import InvalidRequest

_MOST_PARTS, _MOST_HEADERS, _MOST_LINE_BYTES = 16, 8, 16_384
_MOST_LINES: Final = 512
"""That are no part's body: boundaries and heads of so many parts need fewer."""

_MOST_FORM_BYTES = 2**19  # around the file
_CHUNK_BYTES = 65_536
_PARAMETER = re.compile(r';\s*+([^\s=;"]++)=("(?:[^"\\]|\\.)*+"|[^;]*+)', re.DOTALL)
_TAMED = bytes.maketrans(bytes(range(0x20)), b"_" * 0x20)  # no header has control characters, but names may


class Part:
    """One field or file; its body comes once, and only before the next part is asked for."""

    def __init__(self, reader: BodyPartReader) -> None:
        self._reader = reader
        self.name, self.filename = _names(reader.headers.get("content-disposition", ""))

    async def chunks(self) -> AsyncIterator[bytes]:
        """Its bytes, as they come. Raises like `Form.next`."""
        while not self._reader.at_eof():
            try:
                data = await self._reader.read_chunk(_CHUNK_BYTES)
            except (ValueError, HttpProcessingError):
                raise bad_form() from None
            if data:
                yield data


class Form:
    """The form that a request sends, with one file of at most `most_bytes`.

    Raises InvalidRequest for what is no form, and HttpRefusal.
    """

    def __init__(self, request: Request, most_bytes: int) -> None:
        kind, _, parameters = request.headers.get("content-type", "").partition(";")
        if kind.strip().lower() != "multipart/form-data":
            raise bad_form("It must be sent as multipart/form-data.")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise compressed_body()
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most_bytes + _MOST_FORM_BYTES:
            raise body_too_large(most_bytes)
        # As `mixed`: of a form the parser would read names itself, and print those that it does not like.
        head = {"Content-Type": f"multipart/mixed;{parameters}"}
        body = cast("StreamReader", _Body(request.receive, most_bytes))
        try:
            self._parts = MultipartReader(head, body, max_field_size=_MOST_LINE_BYTES, max_headers=_MOST_HEADERS)
        except ValueError:
            raise bad_form("Its boundary is missing or too long.") from None
        self._parts_left = _MOST_PARTS

    async def next(self) -> Part | None:
        """The part that comes now; None: there are no more. Raises CallerLeft, too."""
        try:
            found = await self._parts.next()
        except (ValueError, HttpProcessingError):
            raise bad_form() from None
        if found is None:
            return None
        self._parts_left -= 1
        if self._parts_left < 0:
            raise bad_form(f"It must have at most {_MOST_PARTS} parts.")
        if not isinstance(found, BodyPartReader):
            raise bad_form("No part of it may have parts.")
        return Part(found)


class _Body:
    """A request's body as aiohttp's parser reads one, by these four methods; it asks for no more than is wanted."""

    def __init__(self, receive: Receive, most_bytes: int) -> None:
        self._receive = receive
        self._most_bytes = most_bytes
        self._received_bytes = 0
        self._held = bytearray()
        self._ended = False
        self._lines_left = _MOST_LINES

    async def read(self, size: int) -> bytes:
        if not self._held:
            await self._more()
        return self._taken(size)

    async def readline(self, *, max_line_length: int = _MOST_LINE_BYTES) -> bytes:
        end = 0
        while not end and not self._ended and len(self._held) <= max_line_length:
            end = self._held.find(b"\n") + 1
            if not end:
                await self._more()
        self._lines_left -= 1
        end = end or self._held.find(b"\n") + 1 or len(self._held)
        if end > max_line_length or self._lines_left < 0:
            raise ValueError
        line = self._taken(end)
        return line[:-2].translate(_TAMED) + line[-2:]

    def unread_data(self, data: bytes) -> None:
        self._held[:0] = data

    def at_eof(self) -> bool:
        return self._ended and not self._held

    def _taken(self, size: int) -> bytes:
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken

    async def _more(self) -> None:
        if self._ended:
            return
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise CallerLeft
        data = message.get("body", b"")
        self._ended = not message.get("more_body", False)
        self._received_bytes += len(data)
        if self._received_bytes > self._most_bytes + _MOST_FORM_BYTES:
            raise body_too_large(self._most_bytes)
        self._held += data


def bad_form(why: str = "It is not complete, or no form.") -> InvalidRequest:
    """It cannot be read; what was wanted of it is its file."""
    return InvalidRequest(f"We could not read the form of your request. {why}", param="file")


def _names(disposition: str) -> tuple[str, str]:
    """Of the part, and of its file; "" for none."""
    found: dict[str, str] = {}
    for name, value in _PARAMETER.findall(disposition.encode(errors="surrogateescape").decode(errors="replace")):
        quoted = value[:1] == '"'
        found.setdefault(name.lower(), re.sub(r"\\(.)", r"\1", value[1:-1]) if quoted else value.strip())
    encoded = found.get("filename*", "").rpartition("'")[2]
    return found.get("name", ""), unquote(encoded) or found.get("filename", "")
