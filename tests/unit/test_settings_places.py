"""The line finder: where a key stands in a TOML file, whatever is written around it."""

import json
import tomllib
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from app.settings.places import key_lines


def test_lines_are_found_in_every_form_that_toml_has() -> None:
    """Headers, dotted and quoted keys, inline tables, values over several lines and look-alikes inside them."""
    text = '''\
# a = 0
a = 1
b.c = """
a = 2
[x]
"""
list = [
  1, # [y]
  2,
]

[x]
inline = { p = 1, q = { r = 2 } }
[ x . "y.z" ]
'k' = \'\'\'
[z]\'\'\'
[[many]]
one = 1
[[many]]
one = 2
two = 2
'''
    lines = key_lines(text)
    assert lines == {
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 3,
        ("list",): 7,
        ("x",): 12,
        ("x", "inline"): 13,
        ("x", "inline", "p"): 13,
        ("x", "inline", "q"): 13,
        ("x", "inline", "q", "r"): 13,
        ("x", "y.z"): 14,
        ("x", "y.z", "k"): 15,
        ("many",): 17,
        ("many", "one"): 18,
        ("many", "two"): 21,
    }
    assert key_lines(text.replace("\n", "\r\n")) == lines


_CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Cs", "Co", "Cn"))
_QUOTED = partial(json.dumps, ensure_ascii=False)
_NAMES = st.text(_CHARACTERS, min_size=1, max_size=8)
_VALUES = st.one_of(
    st.integers(-9, 9).map(str),
    st.text(_CHARACTERS, max_size=20).map(_QUOTED),
    st.sampled_from(["[\n 1,\n 2\n]", '"""\n[x]\nk = 1\n"""', "'''\n# no\n'''", "{ a = 1 }"]),
)


@given(
    st.dictionaries(_NAMES, st.dictionaries(_NAMES, st.tuples(_VALUES, st.integers(0, 2)), max_size=4), max_size=4),
    st.booleans(),
)
def test_every_key_is_found_on_the_line_where_it_stands(
    tables: dict[str, dict[str, tuple[str, int]]], dotted_keys: bool
) -> None:
    """Whatever is written around it."""
    lines: list[str] = []
    expected: dict[tuple[str, ...], int] = {}
    for table, entries in tables.items():
        if not dotted_keys:
            lines += [f"[{_QUOTED(table)}] # comment"]
            expected[table,] = len(lines)
        for key, (value, gap) in entries.items():
            lines += ["", "# [x]"][:gap]
            at = len(lines) + 1
            prefix = f"{_QUOTED(table)}." if dotted_keys else "  "
            lines += f"{prefix}{_QUOTED(key)} = {value}".split("\n")
            expected.setdefault((table,), at)
            expected[table, key] = at
    text = "\n".join(lines)
    tomllib.loads(text)
    found = key_lines(text)
    assert {path: found.get(path) for path in expected} == expected
