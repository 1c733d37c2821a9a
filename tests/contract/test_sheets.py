"""Nothing that is known of a vendor goes untried: every row of every sheet has a case in the vendor's emulator."""

import importlib
from pathlib import Path

import pytest

from tests.emulators import cases

SHEETS = sorted(path.stem for path in (Path(cases.__file__).parent / "sheets").glob("*.txt"))


@pytest.mark.parametrize("sheet", SHEETS)
def test_every_row_has_a_case_and_every_case_a_row(sheet: str) -> None:
    """Rows without a case are listed, and so are cases that no row asks for."""
    tried = [case.row for case in importlib.import_module(f"tests.emulators.{sheet}").CASES]
    rows = cases.rows(sheet)
    assert sorted(set(rows) - set(tried)) == []
    assert sorted(set(tried) - set(rows)) == []
    assert len(rows) == len(set(rows))
