"""Two thousand callers vanish at random moments (T19): nobody else notices and nothing is left behind."""

import asyncio
import gc
import random
from pathlib import Path

import numpy as np
import openai
import orjson

from tests.api.conftest import KEY, SMALL, Edge, expected, running

CLIENTS, AT_ONCE = 2_000, 500


async def vanish(edge: Edge, number: int, rng: random.Random) -> None:
    """One caller: connects, sends some or all of its request, waits a moment, and is gone."""
    body = orjson.dumps(
        {"model": SMALL, "input": [f"storm {number % 700}", f"own {number}"], "encoding_format": "base64"}
    )
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    whole = head + body
    reader, writer = await edge.connect()
    cut_short = rng.random() < 0.2
    writer.write(whole[: rng.randrange(len(whole))] if cut_short else whole)
    await asyncio.sleep(rng.random() * 0.15)
    if not cut_short and rng.random() < 0.2:
        await reader.read(1)  # gone while the answer is being written
    writer.transport.abort()


async def test_a_storm_of_leaving_callers_leaves_nothing_behind(tmp_path: Path) -> None:
    """Queue, slots, table, pools and tasks are at base after 2 s, no text was sent for nobody, the next 200 succeed."""
    rng = random.Random(19)
    async with running(tmp_path) as edge:
        edge.upstream.latency_s = 0.02
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{edge.url}/v1", max_retries=0) as client:
            await client.embeddings.create(model=SMALL, input="warm")
            await asyncio.sleep(0.1)
            gc.collect()
            base = len(asyncio.all_tasks())
            room = asyncio.Semaphore(AT_ONCE)

            async def one(number: int) -> None:
                async with room:
                    await vanish(edge, number, rng)

            await asyncio.gather(*(one(number) for number in range(CLIENTS)))
            await asyncio.sleep(2.0)
            gateway = edge.runtime.gateway
            assert sum(gateway._bound.items) == sum(gateway._bound.tokens) == 0
            assert [len(batcher) for batcher in gateway._batchers.values()] == [0]
            assert all(gate.in_flight == 0 for gate in gateway._parts.gates.values())
            pools = [endpoint.pool() for endpoint in edge.runtime._endpoints.values()]
            assert all((pool.busy, pool.waiting) == (0, 0) for pool in pools)
            assert len(asyncio.all_tasks()) <= base
            assert edge.answers(400) == edge.answers(500, "internal_error") == 0
            assert edge.answers(499) > 0

            texts = [f"after {number}" for number in range(200)]
            found = await asyncio.gather(*(client.embeddings.create(model=SMALL, input=text) for text in texts))
            vectors = np.array([answer.data[0].embedding for answer in found], dtype="<f4")
            np.testing.assert_array_equal(vectors, expected(texts))
