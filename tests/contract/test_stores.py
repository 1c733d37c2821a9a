"""Several processes on the same stores: what one bought or used up is bought and used up for all, and no more."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import redis
from prometheus_client import generate_latest
from sqlalchemy import column, func, select, table

from app.cache_desk import CacheDesk, Invalidation
from app.domain import EmbeddingRequest, EmbeddingResult, Tenant
from app.errors import ConfigurationError, RateLimited
from app.runtime import Runtime
from app.settings import load
from app.storage.level import LevelDown
from app.storage.sql.database import Database
from app.storage.sql.tables import cache, landmarks
from tests.contract.stored import scalars
from tests.emulators.openai import MODELS, OpenAIEmulator
from tests.identity import identifying_vector
from tests.servers import PostgresProcess, ValkeyProcess

MODEL = "text-embedding-3-small"
SECRET, OTHER = "nothing-but-tests-knows-it", "nobody-has-seen-this-one"
SOON_S = 10.0
"""Until a store that has come is used."""

PATIENCE_S = 5.0
"""For a level of the cache: a machine that is busy may take longer than a request would wait."""

CONFIGURATION = """
[server]
log_file = "{folder}/log.jsonl"
secret = {secret}
[stores]
data_dir = "{folder}/data"
{stores}
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "{upstreams}"
[models.{model}]
deployments = ["main"]
canary_interval_s = 0
{model_lines}
[tenants.search]
api_key = "key-of-search"
{tenant_lines}
[tenants.archive]
api_key = "key-of-archive"
cache_group = "archive"
"""


class Site:
    """Where processes are started: one upstream, one configuration, a folder for each name."""

    def __init__(self, folder: Path, upstream: OpenAIEmulator, **stores: str) -> None:
        self.folder = folder
        self.upstream = upstream
        self.stores = stores

    @asynccontextmanager
    async def process(
        self,
        name: str = "a",
        *,
        secrets: Sequence[str] = (SECRET,),
        serves: bool = True,
        upstreams: str = MODEL,
        model_lines: str = "",
        tenant_lines: str = "",
    ) -> AsyncIterator[Runtime]:
        """A Runtime with a memory and a folder of its own; `upstreams` is what its model is called upstream."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        stores = "\n".join(f'{store} = "{url}"' for store, url in self.stores.items())
        path = folder / "embedgate.toml"
        path.write_text(
            CONFIGURATION.format(
                folder=folder, secret=json.dumps([*secrets]), stores=stores, upstream=self.upstream.base_url,
                model=MODEL, upstreams=upstreams, model_lines=model_lines, tenant_lines=tenant_lines,
            )
        )  # fmt: skip
        async with Runtime(load(path, {}), serves=serves) as runtime:
            runtime.stores.sql._within_s = PATIENCE_S
            for level in runtime.stores.cache._levels:
                level._budget_s = PATIENCE_S
            yield runtime

    @property
    def bought(self) -> int:
        """How many calls arrived upstream."""
        return len(self.upstream.arrivals)


async def ask(runtime: Runtime, *texts: str, tenant: str = "search") -> EmbeddingResult:
    """What the tenant gets; every text its own vector."""
    caller: Tenant = runtime.tenants[f"key-of-{tenant}"]
    result = await runtime.gateway.embed(EmbeddingRequest(caller, MODEL, texts, time.monotonic() + 10))
    for text, data in zip(texts, result.vectors, strict=True):
        model = result.space.model
        full = identifying_vector(text, model, MODELS[model].dimensions)[: len(data) // 4]
        assert np.allclose(np.frombuffer(data, "<f4"), full / np.linalg.norm(full), atol=1e-6)
    return result


async def until(holds: Callable[[], bool], within_s: float = SOON_S) -> None:
    """Waits for what nobody tells."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def written(runtime: Runtime) -> None:
    """What was put into the cache has arrived in all its levels."""
    await until(lambda: not any(level._waiting_bytes for level in runtime.stores.cache._levels))


@pytest.fixture
async def upstream() -> AsyncIterator[OpenAIEmulator]:
    """Where texts are bought; when it closes, no process has left a task behind."""
    async with OpenAIEmulator() as emulator:
        yield emulator
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture(params=["redis and postgres", "postgres", "sqlite"])
def site(request: pytest.FixtureRequest, tmp_path: Path, upstream: OpenAIEmulator) -> Site:
    """On empty stores of each kind."""
    stores: dict[str, str] = {}
    if "postgres" in request.param:
        stores["database_url"] = request.getfixturevalue("postgres_url")
    else:
        stores["database_url"] = request.getfixturevalue("sqlite_url")
    if "redis" in request.param:
        stores["redis_url"] = request.getfixturevalue("redis_url")
    return Site(tmp_path, upstream, **stores)


@pytest.fixture
def shared(tmp_path: Path, upstream: OpenAIEmulator, redis_url: str, postgres_url: str) -> Site:
    """On what several servers share."""
    return Site(tmp_path, upstream, redis_url=redis_url, database_url=postgres_url)


# ── one cache, one quota ────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_one_process_bought_another_does_not_buy(shared: Site) -> None:
    """Both ways, while both run; what neither has is bought once more."""
    async with shared.process("a") as one, shared.process("b") as other:
        await ask(one, "bought by one", "by one too")
        await ask(other, "bought by the other")
        await asyncio.gather(written(one), written(other))
        assert shared.bought == 2
        assert (await ask(other, "bought by one", "by one too")).cache_hits == 2
        assert (await ask(one, "bought by the other")).cache_hits == 1
        assert shared.bought == 2
        assert (await ask(one, "bought by the other", "bought by nobody")).cache_hits == 1
    assert shared.bought == 3


async def test_the_database_alone_is_enough_to_share(
    postgres_url: str, tmp_path: Path, upstream: OpenAIEmulator
) -> None:
    """Redis is the nearer place, not the only one."""
    site = Site(tmp_path, upstream, database_url=postgres_url)
    async with site.process("a") as one, site.process("b") as other:
        await ask(one, "bought by one")
        await written(one)
        assert (await ask(other, "bought by one")).cache_hits == 1
    assert site.bought == 1


async def test_groups_of_tenants_do_not_share(shared: Site) -> None:
    """T33: what one group bought another buys again, in whatever process; each then has its own."""
    async with shared.process("a") as one, shared.process("b") as other:
        await ask(one, "text", tenant="search")
        await written(one)
        for runtime in (one, other):
            assert (await ask(runtime, "text", tenant="archive")).cache_hits == (runtime is other)
            await written(runtime)
        assert shared.bought == 2
        assert (await ask(other, "text", tenant="search")).cache_hits == 1


async def test_a_quota_is_one_for_all_processes(shared: Site) -> None:
    """What a tenant has under way in one counts in the other, until it has ended."""
    shared.upstream.latency_s = 0.3
    async with (
        shared.process("a", tenant_lines="max_in_flight = 1") as one,
        shared.process("b", tenant_lines="max_in_flight = 1") as other,
    ):
        first = asyncio.ensure_future(ask(one, "first"))
        await until(lambda: shared.bought == 1)
        with pytest.raises(RateLimited):
            await ask(other, "second")
        await ask(other, "of another tenant", tenant="archive")
        await first
        await ask(other, "second")
    assert shared.bought == 3


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_another_secret_is_refused_in_a_line(site: Site) -> None:
    """Before anything is served, and what is there stays as it was."""
    async with site.process() as runtime:
        await ask(runtime, "kept")
    with pytest.raises(ConfigurationError, match=r"^server\.secret is not the one [^\n]+$"):
        async with site.process(secrets=[OTHER]):
            pytest.fail("it was served")
    async with site.process() as runtime:
        assert (await ask(runtime, "kept")).cache_hits == 1
    assert site.bought == 1


async def test_a_rotated_secret_loses_nothing(site: Site) -> None:
    """With the old one beside it all is found, and kept anew: later the new one alone finds what was asked for."""
    async with site.process() as runtime:
        await ask(runtime, "kept", "never asked for again")
    async with site.process(secrets=[OTHER, SECRET]) as runtime:
        assert (await ask(runtime, "kept")).cache_hits == 1
        await ask(runtime, "new")
    assert site.bought == 2
    async with site.process(secrets=[OTHER]) as runtime:
        assert (await ask(runtime, "kept", "new")).cache_hits == 2
        assert site.bought == 2
        await ask(runtime, "never asked for again")
    assert site.bought == 3
    with pytest.raises(ConfigurationError, match="secret"):
        async with site.process(secrets=[SECRET]):
            pytest.fail("it was served")


async def test_processes_before_and_after_a_rotation_work_side_by_side(shared: Site) -> None:
    """While replicas are restarted one after the other nothing is bought twice by those that know both."""
    async with shared.process("a", secrets=[SECRET, OTHER]) as before:
        await ask(before, "bought before")
        await written(before)
        async with shared.process("b", secrets=[OTHER, SECRET]) as after:
            assert (await ask(after, "bought before")).cache_hits == 1
            await ask(after, "bought after")
            await written(after)
            assert (await ask(before, "bought after")).cache_hits == 1
    assert shared.bought == 2


# ── one file, one server ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_second_server_on_the_same_file_is_refused_but_a_tool_is_not(
    tmp_path: Path, upstream: OpenAIEmulator
) -> None:
    """One line names the file; the tool finds what the server bought, and the file is free again afterwards."""
    site = Site(tmp_path, upstream)
    async with site.process() as server:
        await ask(server, "bought")
        await written(server)
        with pytest.raises(ConfigurationError, match=r"^stores\.data_dir: another server already uses [^\n]+$"):
            async with site.process():
                pytest.fail("it was served")
        async with site.process(serves=False) as tool:
            assert (await ask(tool, "bought")).cache_hits == 1
    async with site.process() as server:
        assert (await ask(server, "bought")).cache_hits == 1
    assert site.bought == 1


# ── versions ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("upstreams", "dimensions"), [(MODEL, 256), ("text-embedding-3-large", 1536)], ids=["dimensions", "model"]
)
async def test_another_version_never_reads_what_the_old_one_kept(site: Site, upstreams: str, dimensions: int) -> None:
    """T34: under the same name all is bought anew; back at the old version all is there again."""
    async with site.process() as runtime:
        before = await ask(runtime, "text")
    async with site.process(upstreams=upstreams, model_lines=f"dimensions = {dimensions}") as runtime:
        after = await ask(runtime, "text")
    assert (after.cache_hits, site.bought) == (0, 2)
    assert after.space.id != before.space.id
    async with site.process() as runtime:
        assert (await ask(runtime, "text")).cache_hits == 1


# ── stores that come later ──────────────────────────────────────────────────────────────────────────────────────────


async def test_stores_that_are_down_at_the_start_are_used_when_they_come(
    tmp_path: Path, upstream: OpenAIEmulator, own_valkey: ValkeyProcess, own_postgres: PostgresProcess
) -> None:
    """It serves and is ready all the time; ten seconds later what it bought is shared, and so are quotas."""
    site = Site(tmp_path, upstream, redis_url=own_valkey.url, database_url=own_postgres.url)
    own_valkey.kill()
    own_postgres.kill()
    async with site.process("a") as runtime:
        assert (await ask(runtime, "before")).cache_hits == 0
        assert (await ask(runtime, "before")).cache_hits == 1
        assert runtime.why_not_ready() == []
        assert 'embedgate_limiter_mode{mode="alone"} 1.0' in generate_latest(runtime.telemetry.registry).decode()
        own_valkey.start()
        own_postgres.start()
        await until(lambda: runtime.stores.cache._epochs is not None)
        scraped = generate_latest(runtime.telemetry.registry).decode()
        for said in ('limiter_mode{mode="shared"}', 'store_up{store="redis"}', 'store_up{store="database"}'):
            assert f"embedgate_{said} 1.0" in scraped
        await ask(runtime, "after")
        await written(runtime)
        async with site.process("b") as other:
            assert (await ask(other, "after")).cache_hits == 1
    assert site.bought == 2


async def test_a_database_that_turns_out_to_be_anothers_is_left_alone(
    tmp_path: Path, upstream: OpenAIEmulator, own_postgres: PostgresProcess
) -> None:
    """The process serves, says that it should not, and neither reads nor writes nor deletes a thing there."""
    theirs = Site(tmp_path / "theirs", upstream, database_url=own_postgres.url)
    theirs.folder.mkdir()
    async with theirs.process() as runtime:
        await ask(runtime, "theirs")
    own_postgres.kill()
    ours = Site(tmp_path, upstream, database_url=own_postgres.url)
    async with ours.process(secrets=[OTHER]) as runtime:
        own_postgres.start()
        await until(lambda: bool(runtime.why_not_ready()))
        assert "server.secret is not the one" in runtime.why_not_ready()[0]
        assert (await ask(runtime, "theirs")).cache_hits == 0
        await runtime.stores.landmarks.accept("ours", np.ones((1, 4), np.float32))
        assert not await runtime.stores.landmarks.claim("ours", 60)
        with pytest.raises(LevelDown):
            await CacheDesk(runtime).invalidate(Invalidation(everything=True))
        assert (await runtime.stores.cache.stats())["sql"] is None
    async with Database(own_postgres.url) as database:
        assert await scalars(database, select(func.count()).select_from(cache)) == [1]
        assert await scalars(database, select(func.count()).select_from(landmarks)) == [0]


async def test_closing_leaves_no_connection_behind(shared: Site) -> None:
    """Neither store knows of anybody but who looks."""
    async with shared.process() as runtime:
        await ask(runtime, "text")
        await written(runtime)
    there = select(func.count()).select_from(table("pg_stat_activity", column("datname")))
    there = there.where(column("datname") == func.current_database())
    async with Database(shared.stores["database_url"]) as database, asyncio.timeout(SOON_S):
        while await scalars(database, there) != [1]:  # noqa: ASYNC110 — what is waited for tells nobody
            await asyncio.sleep(0.01)
    with redis.Redis.from_url(shared.stores["redis_url"]) as client:
        await until(lambda: len(client.client_list()) == 1)
