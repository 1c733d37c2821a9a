"""What several tests of the configuration use."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Puts a text into `embedgate.toml` and returns its path."""

    def put(text: str) -> Path:
        path = tmp_path / "embedgate.toml"
        path.write_text(text, "utf-8")
        return path

    return put
