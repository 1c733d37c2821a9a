"""When every deployment is out: who cannot wait is told at once, kept texts answer, who can wait is served."""

import asyncio
import time
from pathlib import Path

import httpx

from tests.emulators import faults
from tests.emulators.openai import OpenAIEmulator
from tests.trials.service import KEY, MODEL, deployment, model, p99, service

OPEN = "breaker_open_s = 4\nbreaker_open_cap_s = 5"


async def ask(http: httpx.AsyncClient, text: str, deadline_ms: int) -> tuple[httpx.Response, float]:
    """An answer, and how long it took."""
    started = time.perf_counter()
    answer = await http.post(
        "/v1/embeddings",
        json={"model": MODEL, "input": text},
        headers={"authorization": f"Bearer {KEY}", "x-embedgate-deadline-ms": str(deadline_ms)},
    )
    return answer, time.perf_counter() - started


async def test_an_outage_is_told_at_once_and_ends_by_itself(tmp_path: Path) -> None:
    """T27, over a socket."""
    async with OpenAIEmulator() as one, OpenAIEmulator() as other:
        configuration = deployment("one", one.base_url, OPEN) + deployment("other", other.base_url, OPEN)
        async with (
            service(tmp_path, configuration + model("one", "other"), {"one": one, "other": other}) as url,
            httpx.AsyncClient(base_url=url, timeout=20) as http,
        ):
            await ask(http, "kept", 5000)
            one.inject(faults.status(500))
            other.inject(faults.status(500))
            number = 0
            while (await ask(http, f"breaking {number}", 300))[0].headers.get("retry-after") is None:
                number += 1
                assert number < 50
            told = [await ask(http, f"text {at}", 300) for at in range(100)]
            kept = [await ask(http, "kept", 300) for _ in range(20)]
            waiting = asyncio.create_task(ask(http, "can wait", 15_000))
            await asyncio.sleep(0.5)
            one.heal()
            other.heal()
            answer, waited_s = await waiting
        refused = [took_s for said, took_s in told if said.status_code == 503]
        print(
            f"\n503 after p99 {p99(refused) * 1000:.1f} ms ({len(refused)} of 100), "
            f"who waited was served after {waited_s:.2f} s"
        )
        assert len(refused) >= 95
        assert p99(refused) <= 0.020
        waits_ms = [int(said.headers["retry-after-ms"]) for said, _ in told if said.status_code == 503]
        assert 0 < min(waits_ms) <= max(waits_ms) <= 6600
        assert {said.json()["error"]["code"] for said, _ in told if said.status_code == 503} == {"provider_unavailable"}
        assert all(said.status_code == 200 for said, _ in kept)
        assert answer.status_code == 200
        assert waited_s < 8
