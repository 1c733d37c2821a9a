"""The primary fails in three ways under load: callers hardly notice, and it is used again when it heals."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.emulators import faults
from tests.emulators.openai import OpenAIEmulator
from tests.trials.service import Load, deployment, model, p99, service

FAULTS = {
    "500": faults.status(500),
    "hang": faults.hang,
    "429": faults.status(429, faults.error_body("Rate limit reached", "requests", code="rate_limit_exceeded")),
    "429 with Retry-After": faults.status(
        429, faults.error_body("Rate limit reached", "requests", code="rate_limit_exceeded"), {"retry-after": "2"}
    ),
}
FAULT_S, CALM_S, DEADLINE_S = 60.0, 6.0, 5.0


@pytest.mark.parametrize("name", FAULTS)
async def test_the_primary_goes_and_comes_back(tmp_path: Path, name: str) -> None:
    """60 s at 100 requests a second on the fallback, then back."""
    async with OpenAIEmulator(latency_s=0.05) as primary, OpenAIEmulator(latency_s=0.05) as second:
        configuration = deployment("primary", primary.base_url) + deployment("second", second.base_url)
        vendors = {"primary": primary, "second": second}
        async with service(tmp_path, configuration + model(*vendors), vendors) as url:
            load = Load(url, per_second=100, deadline_s=DEADLINE_S)
            await load.run(CALM_S)
            assert {outcome.deployment for outcome in load.outcomes} == {"primary"}

            primary.inject(FAULTS[name])
            failed_at = time.monotonic()
            faulty = await load.run(FAULT_S)
            dead = [at for at in (arrival.at_s for arrival in primary.arrivals) if at > failed_at + 2]
            alive = [at for at in (arrival.at_s for arrival in second.arrivals) if at > failed_at + 2]
            share = len(dead) / (len(dead) + len(alive))

            primary.heal()
            healed_at = time.monotonic()
            calm = await load.run(10)
            await asyncio.sleep(0)
        back = [outcome.began_s + outcome.took_s for outcome in calm if outcome.deployment == "primary"]
        answered = sum(outcome.status == 200 for outcome in faulty) / len(faulty)
        slow = p99([outcome.took_s for outcome in faulty])
        back_s = min(back, default=float("inf")) - healed_at
        stays = [outcome for outcome in calm if outcome.began_s > healed_at + 5 and outcome.deployment != "primary"]
        print(
            f"\n{name}: {answered:.4%} of {len(faulty)} answered, p99 {slow * 1000:.0f} ms, worst "
            f"{max(outcome.took_s for outcome in faulty) * 1000:.0f} ms, {share:.2%} of {len(dead) + len(alive)} calls "
            f"to the dead primary, back after {back_s:.2f} s"
        )
        assert answered >= 0.999
        assert slow <= DEADLINE_S
        assert share <= 0.03
        assert back_s <= 5
        assert not stays
        assert all(outcome.right for outcome in load.outcomes if outcome.status == 200)
        assert all(outcome.status == 200 for outcome in calm)
