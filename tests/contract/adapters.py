"""Every Provider there is, each before what it calls: one line here holds an implementation to the whole contract."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

from app.domain import InputType, Space
from app.ports import Provider
from app.providers.dialect import Dialect
from app.providers.openai import OpenAI
from tests.emulators.openai import OpenAIEmulator
from tests.emulators.server import Emulator
from tests.remote import remote


@dataclass(frozen=True)
class Subject:
    """A Provider, the Space that it is asked for, and the stand-in behind it (none: it works by itself)."""

    provider: Provider
    space: Space
    emulator: Emulator | None


Adapter: TypeAlias = Callable[[], AbstractAsyncContextManager[Subject]]


def vendor(
    wire: type[Dialect],
    emulator: type[Emulator],
    model: str,
    width: int,
    *,
    input_type: InputType | None = None,
    **options: str,
) -> Adapter:
    """The dialect `wire` at its emulator, for vectors of `width`."""

    @asynccontextmanager
    async def made() -> AsyncIterator[Subject]:
        async with emulator() as running:
            provider = remote(
                wire, running.base_url, running.api_key, model, width=width, options=options, max_in_flight=4
            )
            try:
                yield Subject(provider, Space(model, width, input_type=input_type), running)
            finally:
                await provider.aclose()

    return made


ADAPTERS: dict[str, Adapter] = {
    "openai": vendor(OpenAI, OpenAIEmulator, "text-embedding-3-small", 1536),
}
