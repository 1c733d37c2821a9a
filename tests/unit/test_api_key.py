"""How keys are written and recognised: by public id, checksum, and a hash that needs the server's secret."""

import re

from hypothesis import given
from hypothesis import strategies as st

from app.storage import api_key
from app.storage.api_key import KeyHash
from app.storage.secret import MasterSecret

OLD, NEW = b"the secret of before, long", b"the secret of today, longer"


def test_a_key_has_one_form() -> None:
    """Always as long, only letters and digits behind the prefix, and no two alike."""
    keys = {api_key.make() for _ in range(200)}
    assert len(keys) == 200
    assert all(re.fullmatch(r"eg_live_[0-9A-Za-z]{57}", key) for key in keys)
    assert all(len(key) == api_key.LENGTH and api_key.is_sound(key.encode()) for key in keys)


def test_another_secret_keeps_the_public_id() -> None:
    """What an operator knows a key by stays, all else changes."""
    key = api_key.make()
    again = api_key.make(api_key.public_id(key.encode()))
    assert api_key.public_id(again.encode()) == api_key.public_id(key.encode()) == key[8:16]
    assert again != key


@given(place=st.integers(0, api_key.LENGTH - 1), other=st.sampled_from("0Aa_ \x00"))
def test_a_slip_of_the_pen_is_noticed(place: int, other: str) -> None:
    """Any one character changed makes it no key."""
    key = api_key.make()
    changed = key[:place] + other + key[place + 1 :]
    assert api_key.is_sound(changed.encode()) == (changed == key)


@given(st.binary(max_size=200))
def test_nonsense_is_no_key(noise: bytes) -> None:
    """Whatever bytes come: no error, and nothing that looks like one."""
    assert not api_key.is_sound(noise)
    assert len(noise) == api_key.LENGTH or api_key.public_id(noise) == ""


def test_what_is_kept_needs_the_servers_secret() -> None:
    """Another secret keeps something else; a rotated one still knows what was kept before, in its place."""
    key = api_key.make().encode()
    before, after = KeyHash(MasterSecret(OLD)), KeyHash(MasterSecret(NEW, [OLD]))
    assert (len(before.of(key)), before.older(key)) == (32, [])
    assert before.of(key) != after.of(key)
    assert after.older(key) == [before.of(key)]
    assert before.of(api_key.make().encode()) != before.of(key)
