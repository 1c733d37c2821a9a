"""One secret, many keys: derived, told apart, and made once on a machine."""

import stat
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest

from app.errors import ConfigurationError
from app.storage.secret import MasterSecret, own_secret

SECRET, OTHER = b"correct horse battery", b"staple of another kind"


def test_each_purpose_has_a_key_of_its_own() -> None:
    """The same in every process, another one for every purpose and secret."""
    secret = MasterSecret(SECRET)
    keys = {secret.derive("cache"), secret.derive("webhooks"), MasterSecret(OTHER).derive("cache")}
    assert len(keys) == 3
    assert {len(key) for key in keys} == {32}
    assert secret.derive("cache") == MasterSecret(SECRET, [OTHER]).derive("cache")


def test_keys_stay_what_they_are_from_release_to_release() -> None:
    """Else every cache would be lost with an update."""
    assert (
        MasterSecret(SECRET).derive("cache").hex() == "4295901c98e638e09c1a119c6692abaae27ec98152d6ae744b9514c36c493abe"
    )


def test_older_secrets_give_the_keys_of_their_time() -> None:
    """In the order in which they are named."""
    rotated = MasterSecret(b"one more that is the newest", [OTHER, SECRET])
    assert rotated.derive_older("cache") == [MasterSecret(OTHER).derive("cache"), MasterSecret(SECRET).derive("cache")]


def test_a_fingerprint_tells_secrets_apart() -> None:
    """And is none of their keys."""
    assert MasterSecret(SECRET).fingerprint == MasterSecret(SECRET, [OTHER]).fingerprint
    assert MasterSecret(SECRET).fingerprint != MasterSecret(OTHER).fingerprint
    assert MasterSecret(OTHER, [SECRET]).older_fingerprints == [MasterSecret(SECRET).fingerprint]


def test_secrets_of_any_length_count_whole() -> None:
    """Also beyond what the hash takes as a key."""
    long = bytes(range(200))
    assert MasterSecret(long).fingerprint != MasterSecret(long[:-1]).fingerprint


@pytest.mark.parametrize("weak", [b"", b"fifteen letters", b"a" * 64, b"abcab" * 10])
def test_a_secret_that_can_be_guessed_is_refused(weak: bytes) -> None:
    """Without repeating it; as current and as older one."""
    for current, older in ((weak, []), (SECRET, [weak])):
        with pytest.raises(ValueError, match="at least 16 characters") as refusal:
            MasterSecret(current, older)
        assert not weak or weak.decode() not in str(refusal.value)


def test_a_machines_own_secret_is_made_once(tmp_path: Path) -> None:
    """In a file for its owner alone, with nothing left beside it."""
    folder = tmp_path / "data"
    first, second = own_secret(folder), own_secret(folder)
    assert first.fingerprint == second.fingerprint
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert own_secret(tmp_path / "other").fingerprint != first.fingerprint


def test_whoever_starts_at_once_gets_the_same_secret(tmp_path: Path) -> None:
    """Whoever comes second takes the first one's."""

    def start(folder: Path, gate: Barrier) -> str:
        gate.wait()
        return own_secret(folder).fingerprint

    with ThreadPoolExecutor(16) as pool:
        for turn in range(20):
            begin = partial(start, tmp_path / str(turn), Barrier(16))
            started = [pool.submit(begin) for _ in range(16)]
            assert len({each.result() for each in started}) == 1


@pytest.mark.parametrize("content", [b"", b"short\n", b"\n" * 100])
def test_a_damaged_file_is_told_and_left_alone(tmp_path: Path, content: bytes) -> None:
    """What it once held may still be in a backup."""
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(ConfigurationError, match="is damaged"):
        own_secret(tmp_path)
    assert (tmp_path / "secret").read_bytes() == content


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """With its path."""
    (tmp_path / "secret").mkdir()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        own_secret(tmp_path)
