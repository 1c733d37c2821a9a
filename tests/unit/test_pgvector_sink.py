"""What only Postgres can do to a table of vectors: names, keys, rights, servers that are away, and passwords."""

import random
import re
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from app.corpus.rows import DataError, Row, Shape
from app.corpus.sinks import open_sink
from tests.servers import PostgresProcess, free_port
from tests.unit.test_table_sinks import ROWS, SHAPE, VECTORS, WIDE, holds, make, put, refused, sql


@pytest.fixture
def articles(postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A table's URL in an empty database."""
    monkeypatch.chdir(tmp_path)
    return f"{postgres_url}#articles"


def keys(url: str) -> set[str]:
    """Of which columns the table has keys, the primary one with a star."""
    found = sql(
        url,
        "SELECT a.attname || CASE WHEN i.indisprimary THEN '*' ELSE '' END AS key FROM pg_index i "
        "JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] "
        "WHERE i.indrelid = 'articles'::regclass AND i.indisunique",
    )
    return {row["key"] for row in found}


def written(out: str, *rows: Row) -> None:
    """The output of these rows."""
    with closing(open_sink(out)) as sink:
        sink.open(Shape(len(rows), WIDE, ("title",)), None)
        sink.write(rows, VECTORS[: len(rows)])
        sink.finish()


def test_ids_are_the_primary_key_where_they_can_be(articles: str, postgres_url: str) -> None:
    """Rows that share one, or have a very long one, are all there without."""
    written(articles, ROWS[0], ROWS[1])
    assert keys(postgres_url) == {"id*", "embedgate_row"}
    written(articles, ROWS[0], ROWS[0])
    assert keys(postgres_url) == {"embedgate_row"}
    noise = random.Random(1).randbytes(20_000).hex()
    written(articles, ROWS[0]._replace(id=noise))
    assert keys(postgres_url) == {"embedgate_row"}
    assert sql(postgres_url, "SELECT id FROM articles") == [{"id": noise}]


def test_a_nul_is_no_reason_to_lose_a_row(articles: str, postgres_url: str) -> None:
    """Postgres has none in its texts: the replacement character stands there."""
    written(articles, Row(0, "a\0b", "", {"title": "\0"}))
    assert sql(postgres_url, "SELECT id, title FROM articles") == [{"id": "a\ufffdb", "title": "\ufffd"}]


def test_a_table_may_have_any_name_in_any_schema(articles: str, postgres_url: str, tmp_path: Path) -> None:
    """Names stand as they are told, and belong to one table each."""
    sql(postgres_url, 'CREATE SCHEMA "My""S"')
    for name in ('My"S.Order', "select", "ä/b", 'My"S.articles'):
        make(f"{postgres_url}#{name}", rows=3)
        holds(f"{postgres_url}#{name}", rows=3)
    make(articles, rows=4)
    assert sql(postgres_url, 'SELECT count(*) AS n FROM "My""S".articles') == [{"n": 3}]
    assert "does not exist" in refused(f"{postgres_url}#none.articles")
    assert [*tmp_path.iterdir()] == []


def test_an_extension_in_another_schema_is_found(articles: str, postgres_url: str) -> None:
    """Also where no search path leads."""
    sql(postgres_url, "CREATE SCHEMA tools", "CREATE EXTENSION vector SCHEMA tools")
    make(articles)
    holds(articles)


def test_what_postgres_cannot_have_is_told_before_a_row_is_bought(articles: str, postgres_url: str) -> None:
    """Too wide a vector, two columns of one name, a table on which a view stands; what is there stays."""
    assert "dimensions for type vector cannot exceed 16000" in refused(articles, Shape(1, 16_001, ()))
    assert '"xmin" conflicts with a system column' in refused(articles, Shape(1, WIDE, ("xmin",)))
    make(articles)
    sql(postgres_url, "CREATE VIEW seen AS SELECT id FROM articles")
    told = refused(articles)
    assert told.endswith(
        "cannot drop table articles because other objects depend on it: view seen depends on table articles; "
        "drop that first, and make it again once the table is there"
    )
    holds(articles)
    sql(postgres_url, "DROP VIEW seen", "ALTER TABLE articles ENABLE ROW LEVEL SECURITY")
    assert "has row security, which a table in its place would lack: disable it, or name another" in refused(articles)


RIGHTS = """
SELECT relowner::regrole::text AS owner, a.grantee::regrole::text AS who, a.privilege_type AS may, a.is_grantable AS on,
       NULL AS of FROM pg_class, aclexplode(coalesce(relacl, acldefault('r', relowner))) a WHERE relname = 'articles'
UNION ALL
SELECT '', a.grantee::regrole::text, a.privilege_type, a.is_grantable, attname
FROM pg_attribute, aclexplode(attacl) a WHERE attrelid = 'articles'::regclass ORDER BY 1, 2, 3, 5
"""


def test_what_takes_a_tables_place_is_whose_it_was(articles: str, postgres_url: str) -> None:
    """Its owner, who may do what with it, and what is said of its columns stay, and nobody else may do anything."""
    database = urlsplit(postgres_url).path[1:]
    owner, reader = f"Owner {database}", f"reader_{database}"
    make(articles)
    sql(postgres_url, f'CREATE ROLE "{owner}"', f"CREATE ROLE {reader}")
    try:
        sql(
            postgres_url, f'ALTER TABLE articles OWNER TO "{owner}"', f'REVOKE DELETE ON articles FROM "{owner}"',
            f"GRANT SELECT ON articles TO {reader}", f"GRANT UPDATE ON articles TO {reader} WITH GRANT OPTION",
            "GRANT SELECT (title, embedding) ON articles TO PUBLIC", "COMMENT ON COLUMN articles.title IS 'what''s it'",
            f"ALTER DEFAULT PRIVILEGES GRANT INSERT ON TABLES TO {reader}",
        )  # fmt: skip
        before = sql(postgres_url, RIGHTS)
        assert len(before) > 9
        make(articles, rows=5)
        holds(articles, rows=5)
        assert sql(postgres_url, RIGHTS) == before
        assert sql(postgres_url, "SELECT col_description('articles'::regclass, 3) AS said") == [{"said": "what's it"}]
        sql(postgres_url, "ALTER TABLE articles DROP COLUMN title")
        make(articles)
        holds(articles)
    finally:
        sql(postgres_url, f'DROP OWNED BY {reader}, "{owner}"', f'DROP ROLE {reader}, "{owner}"')


def test_who_may_not_is_told(articles: str, postgres_url: str) -> None:
    """Neither make the extension, nor a table, nor replace one of somebody else."""
    database = urlsplit(postgres_url).path[1:]
    role = f"reader_{database}"
    theirs = articles.replace("user@", f"{role}@")
    sql(postgres_url, f"CREATE ROLE {role} LOGIN")
    try:
        told = refused(theirs)
        assert 'permission denied to create extension "vector"; it needs the extension vector (pgvector)' in told
        sql(postgres_url, "CREATE EXTENSION vector")
        assert "permission denied for schema public" in refused(theirs)
        make(articles)
        sql(postgres_url, f"GRANT CREATE ON SCHEMA public TO {role}")
        assert "must be owner of table articles" in refused(theirs)
        holds(articles)
    finally:
        sql(postgres_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_who_is_not_let_in_is_told_without_the_password(tmp_path: Path) -> None:
    """A wrong password, a database that is not there, a server that is not there: one line each."""
    (tmp_path / "hba").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
    (tmp_path / "hba").chmod(0o644)
    with PostgresProcess() as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        sql(server.url, "SET password_encryption = 'scram-sha-256'", "ALTER ROLE \"user\" PASSWORD 'right'")
        hba = sql(server.url, "SHOW hba_file")[0]["hba_file"]
        Path(hba).write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        sql(server.url, "SELECT pg_reload_conf()")
        there = server.url.replace("user@", "user:hush@") + "#articles"
        said = refused(there)
        assert 'password authentication failed for user "user"' in said
        right = there.replace("hush", "right")
        make(right)
        holds(right)
        missing = refused(right.replace("/postgres#", "/none#"))
        assert 'database "none" does not exist' in missing
    away = refused(f"postgresql://user:hush@127.0.0.1:{free_port()}/d#articles")
    assert "cannot be reached" in away
    assert not any(secret in line for line in (said, missing, away) for secret in ("hush", "right"))


@pytest.mark.parametrize(
    "out",
    [
        "postgresql://u:hush@h/d", "postgresql://u:hush@h/d#", "postgresql://u:hu#hush@h/d#t", "postgresql://u:hu/hush@h/d#t",
        "postgresql://u:hu?hush@h/d#t", "postgres:/u:hush@h/d#t", "postgresql://u:hush@[h/d#t", "postgresql:hush",
        "postgresql://u:hu#hush@h/d", "postgresql://u:hush/d#t", "postgresql://u:hush@h:port/d#t",
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_told_without_the_password(out: str) -> None:
    """In a line that says how it has to be."""
    with pytest.raises(DataError, match="#table") as told:
        open_sink(out)
    assert "hush" not in str(told.value)


def test_an_option_that_is_none_is_told_without_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the driver's own complaint say it."""
    monkeypatch.chdir(tmp_path)
    said = refused("postgresql://u:hush@h1:1,[::1]:2/d?password=hush&sslmode=hush#t")
    assert said == "postgresql://u@h1:1,[::1]:2/d#t: its URL is not one that can be understood"


def test_what_belongs_to_a_table_lies_in_this_folder() -> None:
    """Named after the table, another name for each database, the same for each user and password."""
    names = {
        out: open_sink(out).companions
        for out in (
            "postgresql://a:b@h/d#my.ta/ble", "postgres://c@h/d?password=x#my.ta/ble", "postgresql://a:b@g/d#my.ta/ble",
            "postgresql://a:b@h/e#my.ta/ble", "postgresql://a:b@h/d#ta/ble",
        )
    }  # fmt: skip
    first, second, *others = names.values()
    assert re.fullmatch(r"ta_ble\.[0-9a-f]{6}\.pgvector", first)
    assert first == second
    assert len({first, *others}) == 4


def test_a_server_that_is_away_at_the_end_loses_nothing(own_postgres: PostgresProcess, tmp_path: Path) -> None:
    """It may be away meanwhile; at the end a line says so, and the table is made once it is back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        out = f"{own_postgres.new_database()}#articles"
        with closing(open_sink(out)) as sink:
            sink.open(SHAPE, None)
            own_postgres.kill()
            put(sink, 0, 60)
            state = sink.sync()
            with pytest.raises(DataError, match=r"^postgresql://user@\S+#articles: cannot be reached: "):
                sink.finish()
            own_postgres.start()
            sink.open(SHAPE, state)
            sink.finish()
        holds(out)
