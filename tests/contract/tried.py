"""Tries rows of a vendor's sheet: its stand-in answers as the vendor does, and its dialect understands the answer."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import httpx
import pytest

from app.domain import Space, Text
from app.errors import InputRefused, ProviderError, Throttled
from app.providers.dialect import Ask, Dialect, Target
from tests.emulators.cases import Case
from tests.emulators.server import Emulator
from tests.remote import remote

Wire: TypeAlias = type[Dialect]


def _space(wire: Wire, model: str) -> Space:
    """The model's own."""
    card = wire.models.get(model)
    return Space(model, card.dimensions if card else 1536)


async def answered(case: Case, wire: Wire, emulator: Emulator, model: str, options: Mapping[str, str]) -> None:
    """Over plain HTTP the stand-in gives the row's status, headers and words."""
    dialect = wire(Target(model, wire.models.get(model), options=options))
    path, body = dialect.ask(["one"], _space(wire, model))
    if case.asks is None:
        emulator.inject(case.fault(), calls=1)
    url = httpx.URL(emulator.base_url + "/").join(path)
    headers = dialect.headers(emulator.api_key) if emulator.api_key else {}
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(url, json={**body, **(case.asks or {})}, headers=headers)
    assert answer.status_code == case.status
    assert case.content in answer.content
    assert {name: answer.headers.get(name) for name in case.headers} == dict(case.headers)


async def understood(case: Case, wire: Wire, emulator: Emulator, model: str, options: Mapping[str, str]) -> None:
    """The dialect, made to ask as the row says, raises what the row means; the key does not show."""

    def ask(self: Dialect, texts: Sequence[Text], space: Space) -> Ask:
        path, body = wire.ask(self, texts, space)
        return Ask(path, {**body, **(case.asks or {})})

    if case.asks is None:
        emulator.inject(case.fault(), calls=1)
    asking = type("Asking", (wire,), {"ask": ask})
    provider = remote(asking, emulator.base_url, emulator.api_key, model, any_name=True, options=dict(options))
    try:
        if case.means is None:
            await provider.embed(["one"], _space(wire, model), timeout_s=10)
            return
        with pytest.raises(ProviderError) as failed:
            await provider.embed(["one"], _space(wire, model), timeout_s=10)
    finally:
        await provider.aclose()
    error = failed.value
    assert type(error) is case.means
    assert not emulator.api_key or emulator.api_key not in f"{error!r}"
    if isinstance(error, Throttled):
        assert error.retry_after_s == pytest.approx(case.wait_s)
    if isinstance(error, InputRefused):
        assert (error.position, error.too_long) == (case.position, case.too_long)
