"""Hides the Gemini dialect: a request per text, task types or prompts in the text, its errors, its silent cuts."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, ClassVar

import msgspec
import orjson

from app.domain import Space, Text
from app.errors import BadCredential, InputRefused, MalformedReply, Misconfigured, ProviderError, QuotaExhausted
from app.providers.cards import ModelCard, Quota
from app.providers.dialect import Ask, Dialect, Post, Said, prompted
from app.providers.refusals import Answer, by_status, go_duration_s
from app.tokens import Cl100k, TooManyTokens, count_many

_TASKS = {"query": "RETRIEVAL_QUERY", "document": "RETRIEVAL_DOCUMENT"}
_VOCABULARY = Cl100k()
_RETRY = re.compile(r"Please retry in ([0-9.hms]{1,32})")
_NONE_AT_ALL = re.compile(r"\blimit: 0(?!\d)")


class Gemini(Dialect):
    """The Gemini API of Google AI Studio, in the version that Google's own client speaks: `v1`, the stable one."""

    name = "gemini"
    base_url = "https://generativelanguage.googleapis.com/v1"
    max_batch_items = 100
    counts_texts = True  # reported again and again, though not by Google: too careful at worst
    cuts = True
    models: ClassVar[Mapping[str, ModelCard]] = {
        "gemini-embedding-001": ModelCard(
            dimensions=3072, max_input_tokens=2048, sizes=range(128, 3073), matryoshka=True, normalised="full width",
            price=150_000, batch_price=75_000, prompts=(("query", ""), ("document", "")),
            # Google publishes none any more; these were seen before, the free ones without a source.
            tiers={"free": Quota(100, 30_000), "1": Quota(3_000, 1_000_000), "2": Quota(5_000, 5_000_000)},
            shutdown=date(2028, 5, 14), owned_by="google",
        ),
        "gemini-embedding-2": ModelCard(
            dimensions=3072, max_input_tokens=8192, sizes=range(128, 3073), matryoshka=True,
            price=200_000, batch_price=100_000, owned_by="google",
            prompts=(("query", "task: search result | query: "), ("document", "title: none | text: ")),
        ),
    }  # fmt: skip

    def headers(self, key: str) -> dict[str, str]:
        """See `Dialect`; the key may also stand in the URL, where logs would find it."""
        return {"x-goog-api-key": key}

    async def check(self, texts: Sequence[Text], space: Space, post: Post) -> None:
        """See `Dialect`; raises InputRefused for the first text that Google would cut without a word.

        There is no other sign of a cut, so Google itself counts each text that could be too long: one exchange each,
        side by side. Its vocabulary is not public. No token is shorter than a byte; beyond that we count in OpenAI's
        and take half as much again and each digit for a token, which is more than any vocabulary of that size needs.
        """
        if space.truncation == "end":
            return
        doubtful = [
            (place, text)
            for place, text in enumerate(prompted(texts, space))
            if isinstance(text, str) and await _may_exceed(text, space.max_input_tokens)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                counts = [(place, group.create_task(self._count(text, post))) for place, text in doubtful]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        for place, count in counts:
            if count.result() > space.max_input_tokens:
                raise InputRefused("a text that would be cut", position=place, too_long=True)

    async def _count(self, text: str, post: Post) -> int:
        body = {"contents": [{"parts": [{"text": text}]}]}
        answer = await post(Ask(f"models/{self.target.model}:countTokens", body))
        try:
            return _count_decoder.decode(answer.content).total_tokens
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise MalformedReply("a body that is no count of tokens") from None

    def ask(self, texts: Sequence[Text], space: Space) -> Ask:
        """See `Dialect`; one request a text, since several parts of one content share one vector.

        Models with prompts of their own ignore task types, so those are named to the others only.
        """
        common: dict[str, object] = {"model": f"models/{self.target.model}"}
        if space.input_type is not None and not space.prompt:
            common["taskType"] = _TASKS[space.input_type]
        if (size := self.size(space)) is not None:
            common["outputDimensionality"] = size
        requests = [{**common, "content": {"parts": [{"text": text}]}} for text in prompted(texts, space)]
        return Ask(f"models/{self.target.model}:batchEmbedContents", {"requests": requests})

    def read(self, content: bytearray) -> Said:
        """See `Dialect`; in the order of the requests, and without a count of tokens from older models."""
        said = _reply_decoder.decode(content)
        usage = said.usage_metadata if isinstance(said.usage_metadata, dict) else {}
        places = [None] * len(said.embeddings)
        return Said([each.values for each in said.embeddings], places, usage.get("promptTokenCount"))

    def refusal(self, answer: Answer) -> ProviderError:
        """See `Dialect`; a 400 may be about the key, the country or the bill, a 429 may be for a day or for good."""
        error, detail = _Error(answer), f"HTTP {answer.status}"
        if answer.status == 429:
            per_day = any("PerDay" in quota for quota in error.quotas)
            if per_day or _NONE_AT_ALL.search(error.message):
                return QuotaExhausted(f"{detail}: {'for today' if per_day else 'not in this tier'}")
            return by_status(answer, wait_s=error.wait_s)
        if answer.status == 400 and ("API_KEY_INVALID" in error.reasons or error.message.startswith("API key ")):
            return BadCredential(detail)
        if answer.status == 400 and error.status == "FAILED_PRECONDITION":
            return QuotaExhausted(detail) if "billing" in error.message else Misconfigured(f"{detail}: not from here")
        return by_status(answer)


async def _may_exceed(text: str, most: int) -> bool:
    if len(text.encode()) <= most:
        return False
    await asyncio.sleep(0)  # a batch of such texts takes a while to count
    counted = await count_many(_VOCABULARY, [text], most_each=most, most_total=most)
    return isinstance(counted, TooManyTokens) or 1.5 * counted[0] + sum(map(str.isdigit, text)) > most


# ── what comes back ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Embedding(msgspec.Struct):
    values: msgspec.Raw


class _Reply(msgspec.Struct, rename="camel"):
    embeddings: list[_Embedding]
    usage_metadata: Any = None


class _Count(msgspec.Struct, rename="camel"):
    total_tokens: int


_reply_decoder = msgspec.json.Decoder(_Reply)
_count_decoder = msgspec.json.Decoder(_Count)


class _Error:
    """What an error body says, alone or as the one element of a list; nothing of what is not as it should be."""

    def __init__(self, answer: Answer) -> None:
        try:
            said = orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            said = None
        error = _object(_object(said[0] if isinstance(said, list) and said else said).get("error"))
        details = [_object(detail) for detail in _list(error.get("details"))]
        violations = [_object(each) for detail in details for each in _list(detail.get("violations"))]
        self.message = _text(error.get("message"))
        self.status = _text(error.get("status"))
        self.reasons = {_text(detail.get("reason")) for detail in details}
        self.quotas = {_text(violation.get("quotaId")) for violation in violations}
        self._delays = [_text(detail.get("retryDelay")) for detail in details]

    @property
    def wait_s(self) -> float | None:
        """When to come back: as the details say, or else the message."""
        in_words = [found.rstrip(".") for found in _RETRY.findall(self.message)]
        waits = (go_duration_s(delay) for delay in [*self._delays, *in_words])
        return next((wait for wait in waits if wait is not None), None)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
