"""Hides how figures are judged, printed and kept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value beside its target, which is the most it may be, or the least if `at_least`.

    `details` are the raw figures behind it, units in their names; they are kept, not printed.
    """

    measure: str
    value: float
    target: float
    unit: str
    at_least: bool = False
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the target is reached."""
        return self.value >= self.target if self.at_least else self.value <= self.target


def table(figures: Sequence[Figure]) -> str:
    """All figures, a line each."""
    rows = [("MEASURE", "VALUE", "TARGET", "OK")]
    for figure in figures:
        target = f"{'≥' if figure.at_least else '≤'} {figure.target:g} {figure.unit}"
        rows.append((figure.measure, f"{figure.value:.2f} {figure.unit}", target, "yes" if figure.ok else "NO"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def keep(figures: Sequence[Figure], seconds: float, path: Path) -> None:
    """Writes all figures and their details to `path`, as JSON."""
    rows = [{**asdict(figure), "ok": figure.ok} for figure in figures]
    path.write_bytes(orjson.dumps({"seconds": round(seconds, 1), "figures": rows}, option=orjson.OPT_INDENT_2))
