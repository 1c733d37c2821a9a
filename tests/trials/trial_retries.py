"""What fails for everybody is not made worse by retries: a budget, few tries per text, and no waves."""

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


@pytest.mark.parametrize("part", [1.0, 0.5])
async def test_retries_are_bounded(tmp_path: Path, part: float) -> None:
    """At 100 requests a second for a minute."""
    async with OpenAIEmulator(latency_s=0.02) as emulator:
        configuration = deployment("only", emulator.base_url, "max_batch_items = 1") + model("only")
        async with service(tmp_path, configuration) as url:
            load = Load(url, per_second=100, deadline_s=5)
            emulator.inject(failing(part))
            started = time.monotonic()
            outcomes = await load.run(SECONDS)
        tries = Counter(str(arrival.body["input"]) for arrival in emulator.arrivals)
        waves = np.histogram([arrival.at_s - started for arrival in emulator.arrivals], np.arange(0, SECONDS + 5, 0.1))
        counts = waves[0][waves[0].nonzero()[0]] if part == 1.0 else waves[0]
        print(
            f"\n{part:.0%} fail: {len(emulator.arrivals)} calls for {len(outcomes)} requests, at most "
            f"{max(tries.values())} tries a text, busiest 100 ms {counts.max()} of a mean of {counts.mean():.1f}, "
            f"{sum(outcome.status == 200 for outcome in outcomes) / len(outcomes):.1%} answered"
        )
        assert len(emulator.arrivals) <= 1.10 * len(outcomes) + 10
        assert max(tries.values()) <= 3
        assert counts.max() <= max(3 * counts.mean(), 8)
        assert {outcome.status for outcome in outcomes} <= {200, 502, 503}
        assert all(outcome.right for outcome in outcomes if outcome.status == 200)
