"""A small configuration to start from, and how one is refused."""

from pathlib import Path

import pytest

from app.errors import ConfigurationError
from app.settings import load

SMALL = """\
[deployments.main]
dialect = "openai"
base_url = "http://10.0.0.7:8000/v1"
model = "bge-small"

[models.bge]
deployments = ["main"]
dimensions = 384
"""


def refusal(path: Path | None, environ: dict[str, str] | None = None, **options: object) -> list[str]:
    """The lines with which a configuration is refused, the file's folder cut off."""
    with pytest.raises(ConfigurationError) as refused:
        load(path, environ or {}, options=options)
    return str(refused.value).replace(f"{path.parent}/" if path else "\0", "").splitlines()
