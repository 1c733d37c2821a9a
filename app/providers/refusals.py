"""Hides what an answer that is no 2xx asks for: what statuses mean at every vendor, and when to come back."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from app.errors import (
    BadCredential,
    InputRefused,
    MalformedReply,
    Misconfigured,
    ProviderError,
    QuotaExhausted,
    Throttled,
    Transient,
)

LONGEST_WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer; the content of one that is no 2xx may be cut off. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytearray

    def said(self) -> dict[str, Any]:
        """The body if it is a JSON object, else an empty one."""
        try:
            said = orjson.loads(self.content)
        except orjson.JSONDecodeError:
            return {}
        return said if isinstance(said, dict) else {}


def by_status(answer: Answer, *, wait_s: float | None = None) -> ProviderError:
    """What the status alone says; `wait_s` is when to come back, where the vendor says it elsewhere than in headers."""
    status, detail = answer.status, f"HTTP {answer.status}"
    if status == 402:
        return QuotaExhausted(detail)
    if status == 429:
        return Throttled(detail, retry_after_s(answer.headers) if wait_s is None else bounded(wait_s))
    if status in (401, 403):
        return BadCredential(detail)
    if 300 <= status < 400 or status in (404, 405, 501):
        return Misconfigured(detail)
    if status in (400, 413, 422):
        return InputRefused(detail)
    if status in (408, 409, 424) or status >= 500:
        return Transient(detail)
    return MalformedReply(detail)


# ── when to come back ───────────────────────────────────────────────────────────────────────────────────────────────


def retry_after_s(headers: Mapping[str, str], kind: str = "") -> float | None:
    """How long the provider asks to wait, bounded; None if it does not say, or nothing that can be read.

    `retry-after-ms` before `retry-after` (seconds or a date) before the time in which the bucket of `kind`
    (`requests` or `tokens`; else the slower of both) is full again.
    """
    resets = [kind] if kind in ("requests", "tokens") else ["requests", "tokens"]
    waits = [go_duration_s(headers.get(f"x-ratelimit-reset-{reset}", "")) for reset in resets]
    wait_s = _first(
        _number(headers.get("retry-after-ms", ""), scale=1e-3),
        _number(headers.get("retry-after", "")),
        _until_s(headers.get("retry-after", "")),
        max((wait for wait in waits if wait is not None), default=None),
    )
    return None if wait_s is None else bounded(wait_s)


def bounded(wait_s: float) -> float:
    """No wait is negative, and none longer than `LONGEST_WAIT_S`."""
    return min(max(wait_s, 0.0), LONGEST_WAIT_S)


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s)")
_MOST_CHARS = 32  # a thousand digits without a unit would take the expression a long time
_UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3}


def go_duration_s(text: str) -> float | None:
    """`6m0s`, `8.64s`, `20ms` in seconds."""
    if not 0 < len(text) <= _MOST_CHARS or _DURATION.sub("", text):
        return None
    return sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION.findall(text))


def _first(*waits: float | None) -> float | None:
    return next((wait for wait in waits if wait is not None), None)


def _number(text: str, scale: float = 1.0) -> float | None:
    try:
        value = float(text) * scale
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _until_s(text: str) -> float | None:
    try:
        date = parsedate_to_datetime(text)
        return (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
