"""Hides how rows are printed: aligned columns for people, one JSON object a line for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Row: TypeAlias = Mapping[str, object]
"""Values by column; every row of a table has the same columns."""


def table(rows: Sequence[Row]) -> str:
    """The rows under a head of their columns' names; `-` is what is not known."""
    lines = [[column.replace("_", " ").upper() for column in rows[0]]] if rows else []
    lines += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines)


def json_lines(rows: Sequence[Row]) -> str:
    """The rows as programs read them; None is what is not known."""
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def _cell(value: object) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
