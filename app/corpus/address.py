"""Hides how a table in Postgres is written as a URL, and which part of it may be seen."""

import re
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs

from app.corpus.rows import DataError

_SCHEMES = ("postgresql:", "postgres:")
_LANCE = ".lance"
_URL = re.compile(r"([^:/?#]+)://([^/?#]*)([^?#]*)(?:\?([^#]*))?")
_HOST = re.compile(r"(\[[^\]]*\]|[^\[\]:]*)(:\d+)?")


@dataclass(frozen=True, slots=True)
class Address:
    """A table: `name` is for people, `url` for the driver, with the password; `schema` is "" for the user's own."""

    name: str
    url: str = field(repr=False)
    schema: str
    table: str
    where: str

    @property
    def companions(self) -> str:
        """What the names of files that belong to it begin with; tables of other databases have other ones."""
        told = blake2b(self.where.encode(), digest_size=3).hexdigest()
        table = re.sub(r"[^\w.-]", "_", self.table)
        return f"{table}.{told}.pgvector"


def is_address(out: str) -> bool:
    """Whether it is meant to be a URL of Postgres."""
    return out.startswith(_SCHEMES)


def address(out: str) -> Address:
    """Of `postgresql://user:password@host/database#table`. Raises DataError that says nothing that may be secret."""
    url, _, fragment = out.partition("#")
    parts = _parts(url)
    if parts is None or re.search("[@#]", parts.path + parts.query + fragment):
        form = "postgresql://user:password@host/database#table, in a password @ / ? # as %40 %2F %3F %23"
        raise DataError(f"--out: this is no URL of a table; it has to be {form}")
    schema, _, table = fragment.rpartition(".")
    if not table:
        raise DataError(f"--out: {_shown(parts)} names no table; add #table or #schema.table")
    query = parse_qs(parts.query)
    server = [parts.netloc.rpartition("@")[2], *query.get("host", ()), *query.get("port", ())]
    where = "\0".join([*server, parts.path, *query.get("dbname", ()), fragment])
    return Address(f"{_shown(parts)}#{fragment}", url, schema, table, where)


def beside(out: str) -> str:
    """What the names of files that belong to an output begin with. Raises DataError."""
    if is_address(out):
        return address(out).companions
    path = Path(out)
    return str(path.with_suffix(_LANCE) if path.suffix.lower() == _LANCE else path)  # as LanceDB spells it


def shown(out: str) -> str:
    """An output's name for people: without a password."""
    return address(out).name if is_address(out) else out


class _Parts(NamedTuple):
    """Of a URL. The standard library's own, by its version, knows no several hosts."""

    scheme: str
    netloc: str
    path: str
    query: str


def _parts(url: str) -> _Parts | None:
    """None where it is none: who forgets a part of it, or to write a sign as %40, must not see a password as a host."""
    found = _URL.fullmatch(url)
    if found is None:
        return None
    parts = _Parts(*found.groups(default=""))
    hosts = parts.netloc.rpartition("@")[2].split(",")
    return parts if all(map(_HOST.fullmatch, hosts)) else None


def _shown(parts: _Parts) -> str:
    user, at, host = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{user.partition(':')[0]}{at}{host}{parts.path}"
