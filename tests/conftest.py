"""What holds for every test: the same examples in every run, and no event loop but a test's own."""

import asyncio
import itertools
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["tests.servers"]

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the virtual-time plugin from opening a loop for plain tests, which nobody would close."""
    del config
    asyncio.set_event_loop(None)


_homes = itertools.count()


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test lives alone: what is kept in the home directory by default is kept in a new one."""
    path = tmp_path_factory.getbasetemp() / f"home{next(_homes)}"
    monkeypatch.setenv("HOME", str(path))
    return path
