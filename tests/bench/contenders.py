"""Hides what embedgate is measured against: the same JSON in and the same bytes out, with nothing in between."""

from typing import Literal

import orjson
from fastapi import FastAPI, Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from app.vectors import encode_base64
from tests.bench.processes import DIMENSIONS, UPSTREAM_MODEL
from tests.identity import identifying_vector

_VECTOR = encode_base64(identifying_vector("bench", UPSTREAM_MODEL, DIMENSIONS).tobytes())
_ANSWER = (
    b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":"%b"}],"model":"%b",'
    b'"usage":{"prompt_tokens":10,"total_tokens":10}}' % (_VECTOR, UPSTREAM_MODEL.encode())
)
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_ANSWER))]


async def bare(_: Scope, receive: Receive, send: Send) -> None:
    """The least that an ASGI application can do."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    orjson.loads(body)
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _ANSWER})


class Asked(BaseModel):
    """OpenAI's request."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


fastapi = FastAPI()


@fastapi.post("/v1/embeddings")
async def embeddings(_: Asked) -> Response:
    """What most services would do."""
    return Response(_ANSWER, media_type="application/json")


def serving(name: Literal["bare", "fastapi"]) -> tuple[str, ...]:
    """The module that serves one of them, by the same server and loop that embedgate uses."""
    return (
        "uvicorn", f"tests.bench.contenders:{name}", "--port", "{port}", "--http", "httptools", "--loop", "uvloop",
        "--ws", "none", "--lifespan", "off", "--interface", "asgi3", "--log-level", "warning", "--no-access-log",
        "--no-server-header", "--no-proxy-headers",
    )  # fmt: skip
