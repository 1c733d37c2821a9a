"""Hides how one secret becomes a key for each purpose, where it comes from, and that it is still the same one."""

import os
import secrets
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import ConfigurationError
from app.storage.sql.database import Database
from app.storage.sql.tables import facts, insert

_LEAST_BYTES, _LEAST_DIFFERENT = 16, 6
_FILE = "secret"
_FACT = "secret.fingerprint"
_WITHIN_S = 10.0


class MasterSecret:
    """What every key of ours is derived from. ValueError for one that can be guessed.

    `older` ones are for reading what was written before a rotation.
    """

    def __init__(self, current: bytes, older: Sequence[bytes] = ()) -> None:
        self._roots = [_root(secret) for secret in (current, *older)]

    def derive(self, purpose: str) -> bytes:
        """The 32-byte key for `purpose`; from one purpose's key no other can be computed."""
        return _derived(self._roots[0], purpose)

    def derive_older(self, purpose: str) -> list[bytes]:
        """What `derive` returned before each rotation, in the order of `older`."""
        return [_derived(root, purpose) for root in self._roots[1:]]

    @property
    def fingerprint(self) -> str:
        """Tells secrets apart, and nothing else about them."""
        return self.derive("fingerprint").hex()[:32]

    @property
    def older_fingerprints(self) -> list[str]:
        """Those of the older ones."""
        return [key.hex()[:32] for key in self.derive_older("fingerprint")]


def own_secret(data_dir: Path) -> MasterSecret:
    """The secret of this machine, made when it is first asked for; all processes get the same.

    Raises ConfigurationError when it cannot be read or made.
    """
    path = data_dir / _FILE
    try:
        if not path.exists():
            _make(path)
        return MasterSecret(path.read_bytes().strip())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read or made: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged: {error}") from error


async def confirm(database: Database, secret: MasterSecret) -> None:
    """Makes sure that `database` was begun with `secret`, or with an older one of it: that is a rotation.

    Raises ConfigurationError when it was begun with another one, DatabaseDown.
    """

    async def compare(connection: AsyncConnection) -> str:
        first = insert(connection, facts).values(name=_FACT, value=secret.fingerprint)
        await connection.execute(first.on_conflict_do_nothing())
        ours = facts.c.name == _FACT
        rotated = ours & facts.c.value.in_(secret.older_fingerprints)
        await connection.execute(update(facts).where(rotated).values(value=secret.fingerprint))
        return str((await connection.execute(select(facts.c.value).where(ours))).scalar_one())

    if await database.write(compare, within_s=_WITHIN_S) != secret.fingerprint:
        raise ConfigurationError(
            "server.secret is not the one that this store was begun with: set that one, or name it among the older ones"
        )


def _make(path: Path) -> None:
    """Whole or not at all, and the first of several wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = path.with_name(f"{_FILE}.{secrets.token_hex(8)}")
    descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode() + b"\n")
            file.flush()
            os.fsync(descriptor)
        path.hardlink_to(written)
    except FileExistsError:
        return
    finally:
        written.unlink()


def _root(secret: bytes) -> bytes:
    if len(secret) < _LEAST_BYTES or len(set(secret)) < _LEAST_DIFFERENT:
        raise ValueError(f"a secret needs at least {_LEAST_BYTES} characters that nobody can guess")
    return blake2b(secret, digest_size=32, person=b"embedgate").digest()


def _derived(root: bytes, purpose: str) -> bytes:
    return blake2b(purpose.encode(), key=root, digest_size=32).digest()
