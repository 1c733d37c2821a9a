"""What is kept in SQL, on both kinds of database: its tables, its transactions, its secret."""

import asyncio
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import BigInteger, Connection, Float, Integer, LargeBinary, MetaData, Table, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import ConfigurationError
from app.storage.secret import MasterSecret, confirm
from app.storage.sql import migrations
from app.storage.sql.database import Database, DatabaseDown
from app.storage.sql.migrations import look, migrate, pending
from app.storage.sql.tables import cache, facts, metadata, now_ms, now_s, today
from tests.contract.stored import SOON_S, change, scalars

OURS = Path(migrations.__file__).parent

TEN_AT_ONCE = """
import asyncio, multiprocessing, sys
from app.storage.sql.database import Database
from app.storage.sql.migrations import migrate

async def start(url):
    async with Database(url) as database:
        return await migrate(database)

def process(url, gate, told):
    gate.wait()
    told.put(asyncio.run(start(url)))

context = multiprocessing.get_context("fork")
gate, told = context.Barrier(10), context.Queue()
processes = [context.Process(target=process, args=(sys.argv[1], gate, told)) for _ in range(10)]
for each in processes: each.start()
answers = [told.get(timeout=30) for _ in processes]
for each in processes: each.join()
print(sorted(answers, key=str), [each.exitcode for each in processes])
"""

LATER = """
revision, down_revision, additive = "9999", "{head}", {additive}

def upgrade():
    from alembic import op
    op.execute("CREATE TABLE later (id integer)")
"""


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated one of each kind."""
    async with Database(database_url) as opened:
        await migrate(opened)
        yield opened


# ── the tables ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_migrations_make_the_tables_that_the_program_knows(database: Database) -> None:
    """Tables, columns, types and indexes: nothing is left to be generated."""

    def differences(connection: Connection) -> Any:
        return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)

    found = await database.read(lambda connection: connection.run_sync(differences), within_s=SOON_S)
    assert found == []


async def test_every_migration_takes_tables_that_are_filled(database_url: str) -> None:
    """A row in every table before each step, and all of them there after it."""
    config = Config()
    config.set_main_option("script_location", migrations.PACKAGED)
    config.set_main_option("path_separator", "os")
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][::-1]

    def step(connection: Connection, revision: str) -> None:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        tables = MetaData()
        tables.reflect(connection)
        for table in tables.sorted_tables:
            if table.name != "alembic_version":
                connection.execute(table.insert(), filled(table, revision))

    async with Database(database_url) as database:
        for revision in revisions:
            await database.write(lambda c, at=revision: c.run_sync(step, at), within_s=SOON_S)  # type: ignore[misc]
        assert not await pending(database)
        rows = await scalars(database, select(func.count()).select_from(cache))
    assert rows == [len(revisions)]


def filled(table: Table, word: str) -> dict[str, object]:
    """A row with something in every column."""
    kinds: dict[type, object] = {LargeBinary: word.encode(), Integer: 1, BigInteger: 1, Float: 1.0}
    return {
        column.name: next((value for kind, value in kinds.items() if isinstance(column.type, kind)), word)
        for column in table.columns
    }


async def test_migrating_is_done_once(database_url: str) -> None:
    """From nothing to the newest revision; the second time there is nothing to do."""
    async with Database(database_url) as database:
        assert await pending(database)
        before, after = await migrate(database)
        assert before is None
        assert not await pending(database)
        assert await migrate(database) == (after, after)


def test_ten_processes_that_start_at_once_migrate_once(database_url: str) -> None:
    """One makes the tables, nine find them."""
    done = subprocess.run(
        [sys.executable, "-c", TEN_AT_ONCE, database_url], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    newest = ScriptDirectory(str(OURS)).get_current_head()
    assert done.stdout.strip() == f"{[(newest, newest)] * 9 + [(None, newest)]} {[0] * 10}"


def a_newer_program(folder: Path, *, additive: bool) -> str:
    """Migrations with one more at the end."""
    newer = folder / "migrations"
    shutil.copytree(OURS, newer, ignore=shutil.ignore_patterns("__pycache__"))
    later = LATER.format(head=ScriptDirectory(str(OURS)).get_current_head(), additive=additive)
    (newer / "versions" / "m9999.py").write_text(later)
    return str(newer)


async def test_a_database_that_only_a_newer_program_can_use_is_refused(database: Database, tmp_path: Path) -> None:
    """Its last step was not one that only adds."""
    await migrate(database, scripts=a_newer_program(tmp_path, additive=False))
    with pytest.raises(ConfigurationError, match="newer embedgate"):
        await migrate(database)


async def test_a_newer_database_that_suits_is_used_as_it_is(database: Database, tmp_path: Path) -> None:
    """Its last step only added: a rolling update may go back."""
    await migrate(database, scripts=a_newer_program(tmp_path, additive=True))
    assert await migrate(database) == ("9999", "9999")
    schema = await look(database)
    assert (schema.newer, schema.suits, schema.missing) == (True, True, ())


async def test_a_step_that_running_servers_would_not_survive_waits_to_be_told(
    database: Database, tmp_path: Path
) -> None:  # fmt: skip
    """At start only what adds is run."""
    newer = a_newer_program(tmp_path, additive=False)
    with pytest.raises(ConfigurationError, match="embedgate migrate"):
        await migrate(database, only_additive=True, scripts=newer)
    assert (await look(database, scripts=newer)).missing == ("9999",)


# ── the database ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        "", "mysql://u:hush@h/d", "/a/path", "sqlite://", "sqlite:///:memory:", "sqlite:///x.db?mode=hush",
        "postgresql://u:hush@h:port/d", "postgresql://u:hush@[h/d", "postgresql://u:hush@h", "postgresql://u:hush@h:5432/",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_used_is_refused_in_one_line(url: str) -> None:
    """Without what may be secret in it."""
    with pytest.raises(ValueError, match="the database's URL") as refusal:
        Database(url)
    assert "hush" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("url", ["postgres://u@h/d", "postgresql://u:p%40@h1:5432,h2:5432/d?sslmode=require"])
def test_urls_are_taken_as_libpq_takes_them(url: str) -> None:
    """Its alias, several hosts, and its options."""
    assert Database(url).dialect == "postgresql"


async def test_a_transaction_is_kept_whole_or_not_at_all(database: Database) -> None:
    """An error in the middle undoes what came before it."""

    async def half(connection: AsyncConnection) -> None:
        await connection.execute(facts.insert().values(name="a", value="b"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await database.write(half, within_s=SOON_S)
    assert await scalars(database, select(facts.c.name).where(facts.c.name == "a")) == []


async def test_a_refused_statement_says_nothing_of_itself(database: Database) -> None:
    """Neither statement nor values; and the database counts as up."""
    for _ in range(5):
        with pytest.raises(DatabaseDown) as refusal:
            await change(database, facts.insert().values(name=None, value="hush"))
        assert "hush" not in str(refusal.value)
        assert "INSERT" not in str(refusal.value)
    assert database.up


async def test_the_clock_is_the_databases(database: Database) -> None:
    """Milliseconds, seconds and days since 1970, whole."""
    rows = await database.read(lambda c: c.execute(select(now_ms, now_s, today)), within_s=SOON_S)
    ms, seconds, day = rows.one()
    assert ms // 1_000_000 == seconds // 1000
    assert ms // 86_400_000 == day
    assert 1_700_000_000 < seconds < 10_000_000_000


async def test_a_second_server_on_the_same_file_is_refused(sqlite_url: str) -> None:
    """Tools may use it beside the first; when that one has ended, the file is free."""
    async with Database(sqlite_url, serves=True) as first:
        with pytest.raises(ConfigurationError, match="another server"):
            async with Database(sqlite_url, serves=True):
                pass
        async with Database(sqlite_url) as tool:
            await migrate(tool)
        assert not await pending(first)
    async with Database(sqlite_url, serves=True) as second:
        assert not await pending(second)


async def test_a_database_file_is_its_owners_alone(tmp_path: Path) -> None:
    """Folder, file and what SQLite puts beside it."""
    folder = tmp_path / "new" / "folder"
    async with Database(f"sqlite:///{folder / 'x.db'}", serves=True) as database:
        await migrate(database)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(("x.db", "x.db-wal", "x.db-shm", "x.db.lock"), 0o600)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


async def test_a_file_that_cannot_be_made_is_the_operators_to_mend(tmp_path: Path) -> None:
    """Said with its path."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        async with Database(f"sqlite:///{tmp_path / 'file' / 'x.db'}"):
            pass


async def test_writers_beside_readers_lose_nothing(database: Database) -> None:
    """Fifty of each at once, each change on top of the one before."""
    await change(database, facts.insert().values(name="count", value=""))

    async def grow(connection: AsyncConnection) -> None:
        await connection.execute(update(facts).where(facts.c.name == "count").values(value=facts.c.value + "x"))

    length = select(func.length(facts.c.value)).where(facts.c.name == "count")
    async with asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(database.write(grow, within_s=SOON_S))
            group.create_task(scalars(database, length))
    assert await scalars(database, length) == [50]


# ── the secret ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_store_knows_the_secret_that_it_was_begun_with(database: Database) -> None:
    """The first of several that come at once is kept; another one is refused, an older one of the new is a rotation."""
    first, second = MasterSecret(os.urandom(32)), MasterSecret(os.urandom(32))
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(confirm(database, first))
    with pytest.raises(ConfigurationError, match=r"server\.secret is not the one"):
        await confirm(database, second)
    await confirm(database, first)


async def test_a_secret_that_names_the_old_one_takes_its_place(database: Database) -> None:
    """From then on the old one alone is refused."""
    old, new = b"the old secret of ours", b"another secret of ours"
    await confirm(database, MasterSecret(old))
    await confirm(database, MasterSecret(new, [b"one that never was here", old]))
    await confirm(database, MasterSecret(new))
    with pytest.raises(ConfigurationError):
        await confirm(database, MasterSecret(old))
