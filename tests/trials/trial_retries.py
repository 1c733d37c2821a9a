"""What fails for everybody is not made worse by retries: a budget, few tries per text, and no waves."""

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.emulators import faults
from tests.emulators.faults import Fault, Wire
from tests.emulators.openai import OpenAIEmulator
from tests.trials.service import Load, deployment, model, service

SECONDS = 60.0


def failing(part: float) -> Fault:
    """Answers this part of the calls with a 500."""
    rng, failure = random.Random(21), faults.status(500)

    async def answer(wire: Wire, content: bytes) -> None:
        await (failure(wire, content) if rng.random() < part else wire.answer(200, content, {}))

    return answer


NEVER_OPEN = "breaker_failures_in_a_row = 1000000\nbreaker_ratio_min_calls = 100000\nbreaker_stall_least_s = 60"


@pytest.mark.parametrize("part", [1.0, 0.5])
async def test_retries_are_bounded(tmp_path: Path, part: float) -> None:
    """At 100 requests a second for a minute; waves are looked for where no breaker holds the calls back."""
    (tmp_path / "breaker").mkdir()
    (tmp_path / "none").mkdir()
    await asyncio.gather(
        _bounded(tmp_path / "breaker", part, breaker=True), _bounded(tmp_path / "none", part, breaker=False)
    )


async def _bounded(folder: Path, part: float, *, breaker: bool) -> None:
    async with OpenAIEmulator(latency_s=0.02) as emulator:
        options = "max_batch_items = 1\n" + ("" if breaker else NEVER_OPEN)
        configuration = deployment("only", emulator.base_url, options) + model("only")
        async with service(folder, configuration, {"only": emulator}) as url:
            load = Load(url, per_second=100, deadline_s=5)
            emulator.inject(failing(part))
            started = time.monotonic()
            outcomes = await load.run(SECONDS)
        tries = Counter(str(arrival.body["input"]) for arrival in emulator.arrivals)
        at_s = [arrival.at_s - started for arrival in emulator.arrivals]
        wave, _ = np.histogram(at_s, np.arange(1, SECONDS - 1, 0.1))
        print(
            f"\n{part:.0%} fail, {'a' if breaker else 'no'} breaker: {len(at_s)} calls for {len(outcomes)} requests, "
            f"at most {max(tries.values())} tries a text, busiest 100 ms {wave.max()} of a mean of {wave.mean():.1f}, "
            f"{sum(outcome.status == 200 for outcome in outcomes) / len(outcomes):.1%} answered"
        )
        assert len(at_s) <= 1.10 * len(outcomes) + 10
        assert max(tries.values()) <= 3
        assert breaker or wave.max() <= 3 * wave.mean()
        assert sum(outcome.status == 200 for outcome in outcomes) >= 0.9 * (1 - part) * len(outcomes)
        assert {outcome.status for outcome in outcomes} <= {200, 502, 503, 504}
        assert all(outcome.right for outcome in outcomes if outcome.status == 200)
