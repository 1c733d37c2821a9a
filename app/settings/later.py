"""Hides what of the grammar later versions will take."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

LATER: Final[Mapping[str, Mapping[str, tuple[object, ...]]]] = MappingProxyType(
    {
        "server": {"workers": (1,)},
    }
)
"""Names of the grammar that this version takes only with a value that changes nothing."""

LATER_SECTIONS: Final = frozenset({"tracing", "embed", "index"})
