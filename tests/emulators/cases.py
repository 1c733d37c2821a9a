"""What every row of a vendor's fact sheet says, as something that can be tried: a `Case` each, in the vendor's file.

`sheets/` holds the rows; `tests/contract/test_sheets.py` lists those that have no case, and cases without a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from app.errors import ProviderError
from tests.emulators import faults

_SHEETS = Path(__file__).parent / "sheets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row: what the vendor answers, and what embedgate makes of it.

    `row` is its line in the sheet. `asks` are fields put over an honest request's body that make the emulator answer
    so by itself; None: the answer is injected word for word. `status` and `headers` are the answer's; `body` is all of
    it (injected) or stands in it (provoked). `means` is the error that the dialect raises, None for a 200; `wait_s`
    what a Throttled says, `position` and `too_long` what an InputRefused says.
    """

    row: str
    status: int
    body: str | Mapping[str, object] = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, object] | None = None
    means: type[ProviderError] | None = None
    wait_s: float | None = None
    position: int | None = None
    too_long: bool = False

    @property
    def content(self) -> bytes:
        """The body as it is sent, or as it must be found."""
        return self.body.encode() if isinstance(self.body, str) else orjson.dumps(self.body)

    def fault(self) -> faults.Fault:
        """The answer, to be injected."""
        return faults.status(self.status, self.content, self.headers)


def rows(sheet: str) -> list[str]:
    """The rows of `sheets/<sheet>.txt`: one vendor's limits, errors and headers, a line each (`§3 401 wrong key`)."""
    lines = (_SHEETS / f"{sheet}.txt").read_text("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
