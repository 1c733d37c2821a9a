"""A form that is read as it comes is the same form however it was cut, and no more of it is held than must be."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from app.api.exchange import CallerLeft
from app.api.form import Form
from app.errors import InvalidRequest

EDGE = b"-edge-"
LIKE_AN_EDGE = [b"\r\n", b"\r", b"\n", b"--", b"-", EDGE, b"--" + EDGE[:3], b"\r\n--" + EDGE[:-1], b"\0", b"x" * 70_000]
BODIES = st.lists(st.sampled_from(LIKE_AN_EDGE) | st.binary(max_size=20), max_size=12).map(b"".join)


def request(pieces: list[bytes], *, whole: bool = True) -> Request:
    """One that sends these pieces, and then nothing more or, if it is not `whole`, is gone."""
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if not left and not whole:
            return {"type": "http.disconnect"}
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left) or not whole}

    kind = b"multipart/form-data; boundary=" + EDGE
    return Request({"type": "http", "headers": [(b"content-type", kind)]}, receive)


def form(*bodies: bytes) -> bytes:
    """A form with these parts."""
    parts = (
        b'--%b\r\nContent-Disposition: form-data; name="%d"\r\n\r\n%b\r\n' % (EDGE, n, b) for n, b in enumerate(bodies)
    )
    return b"".join(parts) + b"--%b--\r\n" % EDGE


async def read(sent: Request) -> list[tuple[str, bytes]]:
    """Names and bodies."""
    found, reading = [], Form(sent, 10**6)
    while (part := await reading.next()) is not None:
        found.append((part.name, b"".join([chunk async for chunk in part.chunks()])))
    return found


@settings(max_examples=300, deadline=None)
@given(
    bodies=st.lists(BODIES.filter(lambda body: b"\r\n--" + EDGE not in b"\r\n" + body), max_size=4),
    cuts=st.lists(st.integers(1, 40) | st.integers(1, 100_000), min_size=1, max_size=20),
)
def test_it_is_the_same_however_it_was_cut(bodies: list[bytes], cuts: list[int]) -> None:
    """Each part has its own bytes, though some look almost like what stands between parts."""
    body, pieces = form(*bodies), list[bytes]()
    while body:
        size_bytes = cuts[len(pieces) % len(cuts)] + len(pieces) // 100
        pieces.append(body[:size_bytes])
        body = body[size_bytes:]
    assert asyncio.run(read(request(pieces))) == [(str(n), body) for n, body in enumerate(bodies)]


async def test_of_parts_there_are_sixteen() -> None:
    """The next one is one too many."""
    assert len(await read(request([form(*[b"x"] * 16)]))) == 16
    with pytest.raises(InvalidRequest, match="at most 16 parts"):
        await read(request([form(*[b"x"] * 17)]))


@pytest.mark.parametrize("at", range(1, 120, 7))
async def test_no_part_of_a_form_is_a_form(at: int) -> None:
    """Wherever it ends, and whether or not its caller has left."""
    cut = form(b"x" * 60)[: min(at, len(form(b"x" * 60)) - 3)]
    with pytest.raises(InvalidRequest):
        await read(request([cut]))
    with pytest.raises(CallerLeft):
        await read(request([cut], whole=False))
