"""What holds for every test: the same examples in every run, and no event loop but a test's own."""

import asyncio

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the virtual-time plugin from opening a loop for plain tests, which nobody would close."""
    del config
    asyncio.set_event_loop(None)
