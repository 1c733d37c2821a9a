"""Hides OpenAI's words for a field that is not as it should be."""

from collections.abc import Collection
from typing import Any

from app.api import bulky
from app.api.errors import printable
from app.errors import InvalidRequest


def missing(path: str) -> InvalidRequest:
    """It has to be there."""
    return InvalidRequest(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")


def unknown(name: str, of: str = "") -> InvalidRequest:
    """There is no such field, of the object `of`."""
    shown = of + printable(name)
    return InvalidRequest(f"Unknown parameter: '{shown}'.", param=shown, code="unknown_parameter")


def kind(path: str, expected: str, given: Any) -> InvalidRequest:
    """It is of another type."""
    message = f"Invalid type for '{path}': expected {expected}, but got {bulky.json_type(given)} instead."
    return InvalidRequest(message, param=path, code="invalid_type")


def value(path: str, given: str, choices: Collection[str]) -> InvalidRequest:
    """It is none of these."""
    *most, last = (f"'{choice}'" for choice in choices)
    listed = f"{', '.join(most)} and {last}" if most else last
    message = f"Invalid value: '{printable(given)}'. Supported values are: {listed}."
    return InvalidRequest(message, param=path, code="invalid_value")


def within(path: str, number: int, least: int, most: int) -> int:
    """The number, if it lies there. Raises InvalidRequest."""
    if least <= number <= most:
        return number
    bound, code = f"less than or equal to {most}", "integer_above_max_value"
    if number < least:
        bound, code = f"greater than or equal to {least}", "integer_below_min_value"
    raise InvalidRequest(f"Invalid value for '{path}' = {number}. Must be {bound}.", param=path, code=code)
