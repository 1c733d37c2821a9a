"""Hides how a database gets the tables that this program knows, whoever else is at it at the same time."""

from dataclasses import dataclass

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import ConfigurationError
from app.storage.sql.database import Database
from app.storage.sql.tables import facts, insert

PACKAGED = "app.storage.sql:migrations"
"""Where ours are, in Alembic's words."""

_MIGRATE_S = 3600.0
_LOOK_S = 10.0
_LOCK = 0x656D6265  # any number that every program of ours uses for this
_SUITS = "schema.suits"


@dataclass(frozen=True, slots=True)
class Schema:
    """What a database has and what this program knows, as revisions; `missing` are those to be run, oldest first.

    `additive`: programs of before can go on working beside them. `newer`: the database has some that are not known
    here; then `suits` says whether it works nevertheless.
    """

    has: str | None
    wanted: str
    missing: tuple[str, ...] = ()
    additive: bool = True
    newer: bool = False
    suits: bool = True


async def look(database: Database, *, scripts: str = PACKAGED) -> Schema:
    """How the tables of `database` stand. Raises DatabaseDown."""
    directory = ScriptDirectory.from_config(_config(scripts))
    return await database.read(lambda connection: _look(connection, directory), within_s=_LOOK_S)


async def pending(database: Database) -> bool:
    """Whether there is something to migrate."""
    return bool((await look(database)).missing)


async def migrate(
    database: Database, *, only_additive: bool = False, scripts: str = PACKAGED
) -> tuple[str | None, str | None]:
    """Brings the tables to what this program knows; from which revision to which. Once, whoever else calls it too.

    Raises ConfigurationError for a database that only a newer program can use, and, with `only_additive`, for one
    that programs which may still run could no longer use then. Raises DatabaseDown; then nothing has changed.
    """
    config = _config(scripts)
    directory = ScriptDirectory.from_config(config)

    async def upgrade(connection: AsyncConnection) -> tuple[str | None, str | None]:
        if database.dialect == "postgresql":  # in SQLite whoever writes is alone
            await connection.execute(text("SET LOCAL statement_timeout = 0"))
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        schema = await _look(connection, directory)
        _check(schema, only_additive=only_additive)
        if schema.newer or not schema.missing:
            return schema.has, schema.has
        await connection.run_sync(_upgrade, config)
        await _note_suited(connection, directory)
        return schema.has, schema.wanted

    return await database.write(upgrade, within_s=_MIGRATE_S)


def _config(scripts: str) -> Config:
    config = Config()
    config.set_main_option("script_location", scripts)
    config.set_main_option("path_separator", "os")
    return config


async def _look(connection: AsyncConnection, directory: ScriptDirectory) -> Schema:
    has = await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())
    known = {script.revision: script for script in directory.walk_revisions()}  # the newest first
    wanted = next(iter(known))
    if has is not None and has not in known:
        return Schema(has, wanted, newer=True, suits=wanted in await _suited(connection))
    missing = [script for script in directory.iterate_revisions(wanted, has or "base") if script.revision != has]
    additive = all(script.module.additive for script in missing)
    return Schema(has, wanted, tuple(script.revision for script in reversed(missing)), additive)


def _check(schema: Schema, *, only_additive: bool) -> None:
    if not schema.suits:
        raise ConfigurationError(
            f"the database is of a newer embedgate (revision {schema.has}; this one knows {schema.wanted}): "
            "run that one"
        )
    if only_additive and schema.has is not None and not schema.additive:
        raise ConfigurationError(
            "the database must be migrated in a way that running servers do not survive: stop them, then run "
            "`embedgate migrate`"
        )


def _upgrade(connection: Connection, config: Config) -> None:
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def _suited(connection: AsyncConnection) -> list[str]:
    """The newest revisions known to programs that can use this database."""
    if not await connection.run_sync(lambda sync: inspect(sync).has_table(facts.name)):
        return []
    value = (await connection.execute(select(facts.c.value).where(facts.c.name == _SUITS))).scalar_one_or_none()
    return (value or "").split()


async def _note_suited(connection: AsyncConnection, directory: ScriptDirectory) -> None:
    suited = []
    for script in directory.walk_revisions():
        suited.append(script.revision)
        if not script.module.additive:
            break
    statement = insert(connection, facts).values(name=_SUITS, value=" ".join(suited))
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["name"], set_={"value": statement.excluded.value})
    )
