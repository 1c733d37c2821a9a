"""Hides a stand-in for Azure OpenAI: deployments of OpenAI's models, both paths, both keys, Azure's own envelope."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import BadCredential, InputRefused, MalformedReply, Misconfigured, ProviderError, Throttled
from tests.emulators.cases import Case
from tests.emulators.faults import Wire, error_body
from tests.emulators.judge import Judge, OverLimit
from tests.emulators.openai import MODELS, ModelCard, OpenAIEmulator
from tests.emulators.server import Asked, RefusalError, Row, Text, parsed

_WRONG_KEY = (
    "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide a valid key for an "
    "active subscription and use a correct regional API endpoint for your resource."
)
_NO_DEPLOYMENT = (
    "The API deployment for this resource does not exist. If you created the deployment within the last 5 minutes, "
    "please wait a moment and try again."
)
_NOT_FOUND = "Resource not found"
_RATES = {"requests": "call rate limit", "tokens": "token rate limit"}
_STAMP = {"apim-request-id": "00000000-0000-0000-0000-000000000000", "x-ms-region": "Emulated North"}
_A_DAY_S = 86_400


def _over(rate: str, wait_s: int) -> str:
    return (
        "Requests to the Embeddings_Create Operation under Azure OpenAI API version 2024-02-15-preview have exceeded "
        f"{rate} of your current OpenAI S0 pricing tier. Please retry after {wait_s} seconds. Please go here: "
        "https://aka.ms/oai/quotaincrease if you would like to further increase the default rate limit."
    )


def _refusal(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> RefusalError:
    """A refusal of Azure's own layer, in its own envelope."""
    return RefusalError(status, {"error": {"code": code, "message": message}}, {**_STAMP, **(headers or {})})


class AzureEmulator(OpenAIEmulator):
    """Azure OpenAI; `deployments` name the models that they serve. See `Emulator`.

    A text has the vector that it has at OpenAI. `base_url` is for the v1 path.
    """

    prefix = "/openai/v1"

    def __init__(
        self,
        *,
        deployments: Mapping[str, str] | None = None,
        api_key: str | None = "azure-emulator-key",
        judge: Judge | None = None,
    ) -> None:
        self.deployments = deployments or {name: name for name in MODELS}
        super().__init__(
            models={name: MODELS[model] for name, model in self.deployments.items()}, api_key=api_key, judge=judge
        )

    async def route(self, wire: Wire, target: str, headers: dict[str, str], body: bytes) -> None:
        """See `Emulator`."""
        if self.api_key not in (None, headers.get("api-key"), headers.get("authorization", "").removeprefix("Bearer ")):
            raise _refusal(401, "401", _WRONG_KEY)
        path, _, query = target.partition("?")
        version = query.removeprefix("api-version=")
        given = parsed(body, _refusal(400, "400", "The request body is not valid JSON."))
        if path == "POST /openai/v1/embeddings" and version in ("", "v1", "preview"):
            return await self._embeddings(wire, given, headers, target)
        head, _, rest = path.partition("/openai/deployments/")
        name, _, operation = rest.partition("/")
        if head == "POST " and operation == "embeddings" and version[:1].isdigit():
            return await self._embeddings(wire, {**given, "model": name}, headers, target)
        raise _refusal(404, "404", _NOT_FOUND)

    def vector(self, model: str, text: Text, width: int) -> npt.NDArray[np.float32]:
        """See `Emulator`."""
        return super().vector(self.deployments[model], text, width)

    def full_width(self, model: str) -> int:
        """See `Emulator`."""
        return MODELS[model].dimensions

    def write(self, asked: Asked, rows: list[Row]) -> bytes:
        """See `Emulator`; names the model, not the deployment."""
        return super().write(replace(asked, model=self.deployments[asked.model]), rows)

    def stamp(self, asked: Asked) -> dict[str, str]:
        """See `Emulator`; what is left, but not of how much."""
        left = {f"x-ratelimit-remaining-{kind}": str(level.left) for kind, level in self.judge.levels().items()}
        return {**_STAMP, **left}

    def over_limit(self, asked: Asked, over: OverLimit) -> RefusalError:
        """See `Emulator`; a day, as has been seen, for what can never fit."""
        wait_s = _A_DAY_S if math.isinf(over.wait_s) else math.ceil(over.wait_s)
        headers = {"retry-after": str(wait_s), "retry-after-ms": str(wait_s * 1000)}
        return _refusal(429, "429", _over(_RATES[over.kind], wait_s), headers)

    def _card(self, model: str) -> ModelCard:
        if model not in self.models:
            raise _refusal(404, "DeploymentNotFound", _NO_DEPLOYMENT)
        return self.models[model]


class DatedAzureEmulator(AzureEmulator):
    """The same; `base_url` is for the dated path."""

    prefix = "/openai"


# ── the sheet ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _row(row: str, status: int, code: str, message: str, means: type[ProviderError], **more: Any) -> Case:
    """A row whose answer is in Azure's envelope."""
    return Case(row=row, status=status, body={"error": {"code": code, "message": message}}, means=means, **more)


def _openai(row: str, message: str, **more: Any) -> Case:
    """A 400 of the model itself, in OpenAI's envelope."""
    body = error_body(message, "invalid_request_error").decode()
    return Case(row=row, status=400, body=body, **{"means": InputRefused, **more})


_INVALID = "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
_LONG = "word" + " word" * 8192

CASES: tuple[Case, ...] = (
    _openai("§2 at most 2,048 inputs", _INVALID, asks={"input": ["a"] * 2049}),
    _openai("§2 at most 16 inputs, old deployments", "Too many inputs. The max number of inputs is 16."),
    _openai(
        "§2 at most 8192 tokens an input", "Invalid 'input': maximum context length is 8192 tokens.",
        asks={"input": _LONG}, too_long=True,
    ),
    Case(
        row="§2 at most 300,000 tokens a request", status=400, means=InputRefused, asks={"input": [_LONG[:-5]] * 37},
        body='"message":"Requested 303104 tokens, max 300000 tokens per request"',
    ),
    _openai(
        "§2 dimensions up to the model's own",
        "Invalid value for 'dimensions' = 1537. Must be less than or equal to 1536.", asks={"dimensions": 1537},
        means=Misconfigured,
    ),
    Case(row="§2 431 more than 10 custom headers", status=431, means=MalformedReply),
    _row("§3 401 wrong key", 401, "401", _WRONG_KEY, BadCredential),
    _row("§3 404 unknown deployment", 404, "DeploymentNotFound", _NO_DEPLOYMENT, Misconfigured, asks={"model": "foo"}),
    _row("§3 404 wrong path or api-version", 404, "404", _NOT_FOUND, Misconfigured),
    _row(
        "§3 429 call rate", 429, "429", _over("call rate limit", 7), Throttled,
        headers={"retry-after": "7", "retry-after-ms": "6500"}, wait_s=6.5,
    ),
    _row(
        "§3 429 token rate, the wait in the message only", 429, "429", _over("token rate limit", 42), Throttled,
        wait_s=42,
    ),
    _row(
        "§3 429 a wait of a day is capped", 429, "429", _over("call rate limit", _A_DAY_S), Throttled,
        headers={"retry-after": "86400"}, wait_s=120,
    ),
    _row(
        "§3 429 a wait of a day in the message is capped", 429, "429", _over("call rate limit", _A_DAY_S), Throttled,
        wait_s=120,
    ),
    _row(
        "§3 429 judged over 1 to 10 seconds", 429, "429", _over("call rate limit", 1), Throttled,
        headers={"retry-after": "1"}, wait_s=1,
    ),
    _openai("§3 400 in OpenAI's envelope", _INVALID, asks={"input": ["a", ""]}),
    _openai(
        "§3 400 an input of many too long", "Invalid 'input[1]': maximum input length is 8192 tokens.",
        asks={"input": ["a", _LONG]}, position=1, too_long=True,
    ),
    _row(
        "§3 header retry-after", 429, "429", _over("call rate limit", 3), Throttled, headers={"retry-after": "3"},
        wait_s=3,
    ),
    _row(
        "§3 header retry-after-ms", 429, "429", _over("call rate limit", 3), Throttled,
        headers={"retry-after": "3", "retry-after-ms": "2500"}, wait_s=2.5,
    ),
    *(
        Case(row=f"§3 header {name}", status=200, headers={name: value}, asks={})
        for name, value in {
            "x-ratelimit-remaining-requests": "5999", "x-ratelimit-remaining-tokens": "999999", **_STAMP,
        }.items()
    ),
)  # fmt: skip
