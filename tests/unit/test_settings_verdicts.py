"""What the answers to probes mean: what an operator reads of them, and what is called wrong."""

from typing import Any

import pytest

from app.engine.canary import Finding
from app.ports import Stated
from app.providers.cards import KNOWN_ON
from app.settings import load, table, verdict
from tests.unit.configurations import SMALL

TIERED = '[deployments.d]\ndialect = "openai"\napi_key = "k"\nmodel = "text-embedding-3-small"\ntier = "1"\n'
TIERED += '[models.m]\ndeployments = ["d"]\ncanary_cosine = 0.99\n'
SOUND = {"latency_s": 0.1234, "dimensions": 1536, "cosine": 0.99991234}


def judged(write: Any, **found: Any) -> dict[str, object]:
    """The row for an answer of the one deployment."""
    return dict(verdict(load(write(TIERED), {}), Finding("m", "d", "s1-x", **found)))


def test_a_sound_answer_is_shown_with_limits_and_price(write: Any) -> None:
    """What the account has stands beside what is configured."""
    assert judged(write, **SOUND, stated=Stated(5000, None)) == {
        "model": "m",
        "deployment": "d",
        "latency_ms": 123,
        "dimensions": 1536,
        "cosine": 0.999912,
        "requests_stated": 5000,
        "requests_configured": 3000,
        "tokens_stated": None,
        "tokens_configured": 1_000_000,
        "usd_per_million": 0.02,
        "price_from": f"catalog of {KNOWN_ON}",
        "wrong": [],
    }


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({**SOUND, "stated": Stated(3000, 1_000_000)}, []),
        ({**SOUND, "cosine": None}, []),
        ({**SOUND, "cosine": 0.99}, []),
        ({**SOUND, "cosine": 0.98}, ["cosine below 0.99: not the vectors that were accepted"]),
        ({**SOUND, "stated": Stated(100)}, ["the account has 100 requests per minute, 3000 are configured"]),
        ({**SOUND, "stated": Stated(0)}, ["the account has 0 requests per minute, 3000 are configured"]),
        (
            {**SOUND, "stated": Stated(None, 40_000)},
            ["the account has 40000 tokens per minute, 1000000 are configured"],
        ),
        ({"error": "BadCredential: HTTP 401", "latency_s": 0.1}, ["BadCredential: HTTP 401"]),
    ],
)
def test_what_is_wrong_is_told(write: Any, found: dict[str, Any], wrong: list[str]) -> None:
    """Errors, other vectors, and quotas that are smaller than what the limiter would fill."""
    assert judged(write, **found)["wrong"] == wrong


def test_no_configured_limit_is_never_too_high(write: Any) -> None:
    """Who configured none is told the account's, and nothing is called wrong."""
    row = verdict(load(write(SMALL), {}), Finding("bge", "main", "s1-x", stated=Stated(60, 1000), dimensions=384))
    assert (row["requests_stated"], row["requests_configured"], row["wrong"]) == (60, None, [])
    assert table([row]).splitlines()[1].split() == [
        "bge", "main", "-", "384", "-", "60", "-", "1000", "-", "-", "unknown", "-",
    ]  # fmt: skip
