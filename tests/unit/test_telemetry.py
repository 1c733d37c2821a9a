"""What can be seen: bounded series, one JSON line per event, nothing that is nobody's business."""

import asyncio
import io
import threading
from typing import Any

import orjson
import pytest
from prometheus_client import generate_latest

from app.domain import Priority, Tenant
from app.telemetry import LogWriter, Telemetry
from tests.rig import ScriptedProvider, engine


def finish(telemetry: Telemetry, **changed: Any) -> None:
    """One finished request."""
    told: dict[str, Any] = {
        "request_id": "req_1", "tenant": "search", "model": "m", "status": 200, "code": None, "duration_s": 0.01,
        "items": 3, "tokens": 30, "cache_hits": 1, "joined": 1, "queue_s": 0.0, "deployment": "d0",
    }  # fmt: skip
    telemetry.request_finished(**{**told, **changed})


def scraped(telemetry: Telemetry) -> list[str]:
    """The samples of a scrape, without their values and times of creation."""
    text = generate_latest(telemetry.registry).decode()
    lines = [line for line in text.splitlines() if line and not line.startswith("#") and "_created" not in line]
    return [line.rsplit(" ", 1)[0] for line in lines]


def lines(stream: io.BytesIO) -> list[dict[str, Any]]:
    """The log, parsed."""
    return [orjson.loads(line) for line in stream.getvalue().splitlines()]


def test_ten_thousand_tenants_and_models_do_not_add_series() -> None:
    """Labels are the configuration's names; everybody else is `other`."""
    telemetry = Telemetry(tenants=["search"], models=["m"], stream=io.BytesIO())
    finish(telemetry)
    finish(telemetry, tenant="someone", model="else")
    before = scraped(telemetry)
    for number in range(10_000):
        finish(telemetry, tenant=f"tenant{number}", model=f"model{number}")
    assert scraped(telemetry) == before
    telemetry.close()


@pytest.mark.looptime
async def test_ten_thousand_tenants_of_the_engine_do_not_add_series() -> None:
    """Neither does the engine, whoever asks."""
    async with engine(ScriptedProvider()) as rig:
        await rig.ask("first", tenant=Tenant("a"))
        before = len(rig.metrics().splitlines())
        for start in range(0, 10_000, 1000):
            await asyncio.gather(*(rig.ask(f"t{at}", tenant=Tenant(f"t{at}")) for at in range(start, start + 1000)))
        assert len(rig.metrics().splitlines()) == before


def test_texts_are_counted_by_how_they_were_answered() -> None:
    """Hits, joins and misses of a request sum to its texts."""
    telemetry = Telemetry(tenants=["search"], models=["m"], stream=io.BytesIO())
    finish(telemetry, items=10, cache_hits=4, joined=1)
    text = generate_latest(telemetry.registry).decode()
    for outcome, count in (("hit", 4), ("joined", 1), ("miss", 5)):
        assert f'embedgate_cache_texts_total{{model="m",outcome="{outcome}",tenant="search"}} {count}.0' in text
    telemetry.close()


def test_every_event_is_one_json_line() -> None:
    """With its time, its name and its own fields."""
    stream = io.BytesIO()
    telemetry = Telemetry(models=["m"], stream=stream)
    finish(telemetry, status=503, code="server_is_overloaded")
    telemetry.breaker_changed(deployment="d0", state="open", reason="failures")
    telemetry.batch_left(deployment="d0", items=1, tokens=2, fill=0.5, reason="drained", waits=[(Priority.BULK, 0.1)])
    telemetry.close()
    told = lines(stream)
    assert [line["event"] for line in told] == ["request.finished", "breaker.changed"]
    assert told[0]["code"] == "server_is_overloaded"
    assert all(line["time"] > 1e9 for line in told)


def test_successes_are_sampled_and_failures_are_not() -> None:
    """`log_sample` thins out what went well; errors and slow requests are always told."""
    stream = io.BytesIO()
    telemetry = Telemetry(models=["m"], stream=stream, log_sample=0.0)
    finish(telemetry)
    finish(telemetry, status=400, code="invalid_type")
    finish(telemetry, duration_s=6.0)
    telemetry.close()
    assert [line["status"] for line in lines(stream)] == [400, 200]


def test_a_crash_is_told_by_class_and_place_only() -> None:
    """An exception's own words may hold a text or a key."""
    stream = io.BytesIO()
    telemetry = Telemetry(stream=stream)
    try:
        raise ValueError("sk-secret")
    except ValueError as error:
        telemetry.loop_crashed(loop="flight", error=error)
    telemetry.close()
    (line,) = lines(stream)
    assert line["error"] == "ValueError"
    assert line["where"].startswith("test_telemetry.py:")
    assert b"sk-secret" not in stream.getvalue()


async def test_a_stream_that_blocks_holds_nobody_up() -> None:
    """Lines wait in a bounded buffer and are dropped, counted, beyond it."""

    class Stuck(io.BytesIO):
        going = threading.Event()

        def write(self, data: Any) -> int:
            self.going.wait(10)
            return super().write(data)

    stream = Stuck()
    writer = LogWriter(stream)
    for number in range(LogWriter._MOST_CHUNKS + 50):
        writer.write({"n": number})
        writer._flush()
    assert 40 <= writer.dropped_lines <= 50
    stream.going.set()
    writer.close()
    assert len(lines(stream)) + writer.dropped_lines == LogWriter._MOST_CHUNKS + 50
