"""Hides how a trial runs several replicas of the service, loads them all in turn, and watches them meanwhile."""

import asyncio
import base64
import itertools
import math
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import aiohttp
import numpy as np

from tests.bench.processes import ROOT
from tests.emulators.judge import Judge
from tests.emulators.openai import OpenAIEmulator
from tests.emulators.server import Arrival
from tests.identity import identifying_vector
from tests.servers import ValkeyProcess
from tests.tcp_proxy import TcpProxy
from tests.trials.service import MODEL, WIDTH, close_books, deployment, model, p99

T = TypeVar("T")

TENANTS = 12
DEADLINE_S = 30.0
_LOOK_S = 0.2
_ALONE = 'embedgate_limiter_mode{mode="alone"} '


# ── replicas ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Stage:
    """Replicas on a Valkey of their own behind a proxy, buying from an emulator.

    What is entered into `stack` is left after the replicas have stopped.
    """

    valkey: ValkeyProcess
    to_valkey: TcpProxy
    emulator: OpenAIEmulator
    urls: Sequence[str]
    stack: AsyncExitStack


@asynccontextmanager
async def stage(
    path: Path, database_url: str, judge: Judge, quota: str = "", *, more: str = ""
) -> AsyncIterator[Stage]:  # fmt: skip
    """Three replicas with one deployment, of this `quota`, whose provider is held by `judge`; see `replicas`.

    When they have stopped, their books are closed against the provider's bill.
    """
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(ValkeyProcess())
        proxy = await stack.enter_async_context(TcpProxy(valkey.port))
        emulator = await stack.enter_async_context(OpenAIEmulator(latency_s=0.05, judge=judge))
        redis_url = valkey.url.replace(str(valkey.port), str(proxy.port))
        served = deployment("only", emulator.base_url, quota) + model("only") + more
        async with replicas(path, served, redis_url=redis_url, database_url=database_url) as urls:
            yield Stage(valkey, proxy, emulator, urls, stack)
        journals = Path(f"{path}.data", "journal")
        await close_books(path.name, database_url, {"only": emulator}, journals=journals, replicas=len(urls))


def per_minute(requests: int, tokens: int) -> str:
    """The configuration of a deployment's quota."""
    return f"requests_per_minute = {requests}\ntokens_per_minute = {tokens}"


@asynccontextmanager
async def replicas(
    path: Path, configuration: str, *, redis_url: str, database_url: str, count: int = 3
) -> AsyncIterator[Sequence[str]]:
    """The URLs, without path, of so many replicas started at once with one configuration and `TENANTS` tenants.

    All that they write lies at `path` with different suffixes.
    """
    lines = [
        f"[server]\nlog_file = '{path}.log'\nsecret = 'nothing-but-trials-know-it'",
        f"[stores]\ndata_dir = '{path}.data'\nredis_url = '{redis_url}'\ndatabase_url = '{database_url}'",
        *(f"[tenants.{key(number)}]\napi_key = '{key(number)}'" for number in range(TENANTS)),
        configuration,
    ]
    file = path.with_suffix(".toml")
    file.write_text("\n".join(lines))
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "serve", "--port", "0", "--config", str(file),
            cwd=ROOT, stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(count)
    ]  # fmt: skip
    try:
        yield await asyncio.gather(*map(_url, processes))
    finally:
        for process in processes:
            if process.returncode is None:
                process.terminate()
        for process in processes:
            await process.wait()


async def _url(of: Process) -> str:
    """Where a replica listens, as it says itself: so many start at once that none may take another's port."""
    assert of.stdout is not None
    async for line in of.stdout:
        if line.startswith(b"base URL"):
            return line.decode().split()[-1].removesuffix("/v1")
    raise RuntimeError("a replica did not start")


def key(number: int) -> str:
    """The name of a tenant, and its key."""
    return f"team-{number}"


async def side_by_side(
    works: Mapping[str, Callable[[], Coroutine[object, object, T]]],
    *,
    at_once: int = 100,
    again_at_once: int = 100,
    slow: Callable[[T], str] = lambda _: "",
) -> Callable[[str], T]:
    """Does all of them; what it returns tells what became of each: its result, or its error is raised.

    What was `slow`, as it says in words, is done again, twice at most: whatever else the machine does only ever makes
    it slower.
    """
    ended = await _all_of(works, at_once)
    for _ in range(2):
        found = {name: each for name, each in ended.items() if not isinstance(each, BaseException)}
        again = {name: why for name, each in found.items() if (why := slow(each))}
        if again:
            print(f"\nonce more: {'; '.join(f'{name} ({why})' for name, why in again.items())}")
            ended |= await _all_of({name: works[name] for name in again}, again_at_once)

    def told(name: str) -> T:
        result = ended[name]
        if isinstance(result, BaseException):
            raise result
        return result

    return told


async def _all_of(
    works: Mapping[str, Callable[[], Coroutine[object, object, T]]], at_once: int
) -> dict[str, T | BaseException]:  # fmt: skip
    room = asyncio.Semaphore(at_once)

    async def one(work: Callable[[], Coroutine[object, object, T]]) -> T:
        async with room:
            return await work()

    return dict(zip(works, await asyncio.gather(*map(one, works.values()), return_exceptions=True), strict=True))


# ── callers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one text, when it was asked (monotonic seconds) and how long it took."""

    began_s: float
    took_s: float
    status: int
    headers: Mapping[str, str]
    error: Mapping[str, str]
    tokens: int = 0
    right: bool = False

    @property
    def as_it_should_be(self) -> bool:
        """A 200 with the text's own vector, or a 429 in the envelope that says when to come again, or not to."""
        if self.status == 200:
            return self.right
        told = "retry-after-ms" in self.headers or self.headers.get("x-should-retry") == "false"
        return self.status == 429 and self.error["code"] == "rate_limit_exceeded" and told


class Callers:
    """An open loop: so many `texts` a second, spread over all replicas and tenants, whatever becomes of the others."""

    def __init__(self, urls: Sequence[str], texts: Iterator[str], *, per_second: float) -> None:
        self._places = zip(itertools.cycle(urls), itertools.cycle(range(TENANTS)), texts, strict=False)
        self._per_second = per_second
        self.answers: list[Answer] = []

    async def run(self, seconds: float) -> None:
        """Sends for so long, and waits for the last answer."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with session() as http, asyncio.TaskGroup() as group:
            for turn in range(int(seconds * self._per_second)):
                await asyncio.sleep(max(0.0, begun + turn / self._per_second - loop.time()))
                url, tenant, text = next(self._places)
                group.create_task(self._one(http, url, key(tenant), text))

    def between(self, start_s: float, end_s: float) -> list[Answer]:
        """The answers to what was asked between two moments."""
        return [answer for answer in self.answers if start_s <= answer.began_s < end_s]

    async def _one(self, http: aiohttp.ClientSession, url: str, name: str, text: str) -> None:
        self.answers.append(await ask(http, url, text, api_key=name))


def session() -> aiohttp.ClientSession:
    """For any number of callers who wait for long."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=DEADLINE_S + 10)
    )


async def ask(
    http: aiohttp.ClientSession, url: str, text: str, *, api_key: str = key(0), model: str = MODEL
) -> Answer:  # fmt: skip
    """Asks one replica for one text."""
    began_s, started_s = time.monotonic(), time.perf_counter()
    body = {"model": model, "input": text, "encoding_format": "base64"}
    async with http.post(
        f"{url}/v1/embeddings", json=body, headers={"authorization": f"Bearer {api_key}"}
    ) as answer:  # fmt: skip
        content = await answer.json()
    took_s = time.perf_counter() - started_s
    if answer.status != 200:
        return Answer(began_s, took_s, answer.status, answer.headers, content["error"])
    found = np.frombuffer(base64.b64decode(content["data"][0]["embedding"]), "<f4")
    right = found.tobytes() == identifying_vector(text, MODEL, WIDTH).tobytes()
    return Answer(began_s, took_s, 200, answer.headers, {}, content["usage"]["total_tokens"], right)


def small_texts(name: str) -> Iterator[str]:
    """Short ones that nobody asked for before."""
    return (f"{name} text {number}" for number in itertools.count())


def sized_texts(name: str, most_tokens: int, seed: int) -> Iterator[str]:
    """Ones that nobody asked for before, of up to so many tokens, log-uniform."""
    rng = np.random.default_rng(seed)
    for number in itertools.count():
        head = f"{name} {number}"
        words = round(np.exp(rng.uniform(0.0, np.log(most_tokens)))) - len(head)
        yield head + " word" * max(0, words)


# ── watching ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Sight:
    """How one replica looked at a moment, on the monotonic clock."""

    at_s: float
    replica: str
    alone: bool
    ready: bool


@dataclass
class Watch:
    """What was seen of all replicas, five times a second."""

    urls: Sequence[str]
    sights: list[Sight] = field(default_factory=list)

    async def run(self) -> None:
        """Looks until it is cancelled."""
        async with session() as http:
            while True:
                await asyncio.gather(*(self._look(http, url) for url in self.urls))
                await asyncio.sleep(_LOOK_S)

    async def _look(self, http: aiohttp.ClientSession, url: str) -> None:
        async with http.get(f"{url}/metrics") as answer:
            (line,) = (line for line in (await answer.text()).splitlines() if line.startswith(_ALONE))
        async with http.get(f"{url}/readyz") as readiness:
            ready = readiness.status == 200
        self.sights.append(Sight(time.monotonic(), url, line.endswith("1.0"), ready))

    def all_s(self, after_s: float, *, alone: bool) -> float:
        """How long after that moment it took until every replica had been seen `alone`, or not."""
        seen = [sight for sight in self.sights if sight.at_s > after_s and sight.alone is alone]
        firsts = (min((sight.at_s for sight in seen if sight.replica == url), default=math.inf) for url in self.urls)
        return max(firsts) - after_s


@asynccontextmanager
async def watched(urls: Sequence[str]) -> AsyncIterator[Watch]:
    """Looks at these replicas until the block is left."""
    watch = Watch(urls)
    async with asyncio.TaskGroup() as group:
        looking = group.create_task(watch.run())
        yield watch
        looking.cancel()


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────────────

WARM_S, CALM_S, BACK_S = 3.0, 6.0, 5.0  # what a replica does for the first time takes longer


@dataclass(frozen=True, slots=True)
class Course:
    """What callers got, and how the replicas looked, before, during and after a fault."""

    calm: Sequence[Answer]
    faulty: Sequence[Answer]
    after: Sequence[Answer]
    watch: Watch
    began_s: float
    ended_s: float

    @property
    def added_s(self) -> float:
        """By how much the 99th percentile of the fault is above that of calm times."""
        return p99([answer.took_s for answer in self.faulty]) - p99([answer.took_s for answer in self.calm])

    @property
    def worst_s(self) -> float:
        """The longest that anybody waited, from when the fault began."""
        return max(answer.took_s for answer in (*self.faulty, *self.after))


async def through(fault: AbstractAsyncContextManager[None], for_s: float, on: Stage, callers: Callers) -> Course:
    """A calm time, a fault for so long, and the time after it, with the same load throughout."""
    await callers.run(WARM_S)
    async with watched(on.urls) as watch, asyncio.TaskGroup() as group:
        started_s = time.monotonic()
        group.create_task(callers.run(CALM_S + for_s + BACK_S))
        await asyncio.sleep(CALM_S)
        began_s = time.monotonic()
        async with fault:
            await asyncio.sleep(for_s)
        ended_s = time.monotonic()
    calm, faulty = callers.between(started_s, began_s), callers.between(began_s, ended_s)
    return Course(calm, faulty, callers.between(ended_s, time.monotonic()), watch, began_s, ended_s)


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def most_in_a_minute(arrivals: Sequence[Arrival], amount: Callable[[Arrival], int]) -> int:
    """The largest sum within any 60 s."""
    most, held, first = 0, 0, 0
    for arrival in arrivals:
        held += amount(arrival)
        while arrivals[first].at_s <= arrival.at_s - 60:
            held -= amount(arrivals[first])
            first += 1
        most = max(most, held)
    return most


def used_tokens(emulator: OpenAIEmulator, start_s: float, end_s: float) -> int:
    """How many arrived at the provider between two moments."""
    return sum(arrival.tokens for arrival in emulator.arrivals if start_s <= arrival.at_s < end_s)
