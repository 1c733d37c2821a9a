"""Which files there are, on both kinds of database: what `FileStore` promises."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import update

from app.errors import BatchLimitExceeded, Conflict, NotFound
from app.job import StoredFile
from app.storage.sql.tables import files
from tests.contract.shop import DAY_S, Shop, open_shop
from tests.contract.stored import change


@pytest_asyncio.fixture
async def shop(database_url: str) -> AsyncIterator[Shop]:
    """On each kind of database."""
    async with open_shop(database_url) as opened:
        yield opened


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_file_is_kept_with_the_stores_time(shop: Shop) -> None:
    """Whatever the uploader's clock says, it lives as long as it was to; it is its tenant's only."""
    kept = await shop.upload("new", created_at_s=5, expires_at_s=5 + DAY_S, filename="ä.jsonl")
    assert kept.created_at_s > 1_700_000_000
    assert kept.expires_at_s == kept.created_at_s + DAY_S
    assert await shop.store.file("a", "new") == kept
    assert kept.filename == "ä.jsonl"
    assert await shop.store.file("b", "new") is None


async def test_a_tenant_keeps_only_so_many_bytes(shop: Shop) -> None:
    """What was deleted has made room, what others have is no matter; 0 is no bound."""
    await shop.upload("other", "b", size_bytes=10**9)
    await shop.upload("two", most_bytes=20)
    with pytest.raises(BatchLimitExceeded):
        await shop.upload("three", most_bytes=29)
    assert await shop.store.delete_file("a", "two")
    await shop.upload("three", most_bytes=20)
    await shop.upload("four", most_bytes=0)


async def test_uploads_at_once_do_not_exceed_the_bytes(shop: Shop) -> None:
    """Ten at a time, of which three have room."""
    uploads = (shop.upload(f"f{n}", most_bytes=45) for n in range(10))
    told = await asyncio.gather(*uploads, return_exceptions=True)
    assert Counter(map(type, told)) == {StoredFile: 3, BatchLimitExceeded: 7}


async def test_files_come_in_pages(shop: Shop) -> None:
    """By creation, in both directions, from behind one, of one purpose; never those of others."""
    await shop.upload("foreign", "b")
    for at, (name, purpose) in enumerate({"f1": "batch", "f2": "batch_output", "f3": "batch"}.items()):
        await shop.upload(name, purpose=purpose)
        await change(shop.database, update(files).where(files.c.id == name).values(created_at_ms=10**14 + at // 2))

    async def page(limit: int = 10, **given: Any) -> tuple[list[str], bool] | None:
        asked: dict[str, Any] = {"purpose": None, "after": "", "ascending": True}
        found = await shop.store.files("a", limit=limit, **(asked | given))
        return found and ([file.id for file in found.rows], found.has_more)

    assert await page() == (["in", "f1", "f2", "f3"], False)
    assert await page(2) == (["in", "f1"], True)
    assert await page(2, after="f1") == (["f2", "f3"], False)
    assert await page(3, after="f3", ascending=False) == (["f2", "f1", "in"], False)
    assert await page(1, purpose="batch", ascending=False) == (["f3"], True)
    assert await page(purpose="batch", after="f2") == (["f3"], False)
    for stranger in ("foreign", "absent", "\0", "\ud800"):
        assert await page(after=stranger) is None


async def test_names_that_no_database_takes_are_those_of_nothing(shop: Shop) -> None:
    """No error of the database's comes of them."""
    for name in ("\0", "file-\0", "\ud800", "ü"):
        assert await shop.store.file("a", name) is None
        assert not await shop.store.delete_file("a", name)
        assert await shop.store.job("a", name) is None
        assert await shop.store.jobs("a", after=name, limit=1) is None
        assert await shop.store.cancel("a", name) is None
        with pytest.raises(NotFound):
            await shop.create(input_file_id=name)


async def test_what_is_deleted_or_expired_is_gone_until_it_is_forgotten(shop: Shop) -> None:
    """Nobody sees it any more; whoever removes bytes is told of it until they are gone."""
    await shop.upload("old", created_at_s=100, expires_at_s=100)
    await shop.upload("later", created_at_s=100, expires_at_s=4000)
    assert await shop.store.file("a", "old") is None
    assert await shop.store.delete_file("a", "in")
    assert not await shop.store.delete_file("a", "in")
    assert not await shop.store.delete_file("b", "later")
    page = await shop.store.files("a", purpose=None, after="", limit=9, ascending=True)
    assert page is not None
    assert [file.id for file in page.rows] == ["later"]
    assert sorted(await shop.store.gone_files(9)) == ["in", "old"]
    assert len(await shop.store.gone_files(1)) == 1
    await shop.store.forget_files(["in", "later"])
    assert await shop.store.gone_files(9) == ["old"]
    assert await shop.store.file("a", "later") is not None


async def test_a_file_that_an_open_job_reads_stays(shop: Shop) -> None:
    """It cannot be deleted, and its bytes are kept though it expires; once the job is over they go."""
    job = await shop.begin()
    with pytest.raises(Conflict) as refused:
        await shop.store.delete_file("a", "in")
    assert refused.value.code == "file_in_use"
    await change(shop.database, update(files).values(expires_at_s=1))
    assert await shop.store.gone_files(9) == []
    assert await shop.store.close(await shop.finish(), output=None, errors=None)
    assert (await shop.look(job)).status == "completed"
    assert await shop.store.gone_files(9) == ["in"]
