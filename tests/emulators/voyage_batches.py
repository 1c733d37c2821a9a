"""Hides in what Voyage's files and batches differ from OpenAI's on the wire, for its stand-in."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson

from tests.emulators.batches import Batch, Stored
from tests.emulators.openai_batches import OpenAIDesk
from tests.emulators.server import Asked, RefusalError

if TYPE_CHECKING:
    from tests.emulators.voyage import VoyageEmulator

_MODELS = {
    "voyage-4-large", "voyage-4", "voyage-4-lite", "voyage-3-large", "voyage-3.5", "voyage-3.5-lite", "voyage-code-3",
    "voyage-code-2",
}  # fmt: skip
_FIELDS = {"model", "input_type", "truncation", "output_dimension", "output_dtype"}


class VoyageDesk(OpenAIDesk):
    """Voyage's: what all lines share is said once, times are words, and nothing ever expires as a whole."""

    emulator: "VoyageEmulator"  # type: ignore[assignment]  # what is used of it, both have
    windows = ("12h",)

    def refused(self, message: str, status: int = 400, param: str | None = None) -> RefusalError:
        """See `OpenAIDesk`."""
        return RefusalError(status, {"detail": message})

    def file_object(self, stored: Stored) -> dict[str, Any]:
        """See `OpenAIDesk`; no status, and a hyphen in the purpose."""
        said = super().file_object(stored)
        purpose = stored.purpose.replace("_", "-")
        times = {name: _iso(said[name]) for name in ("created_at", "expires_at")}
        return {**said, "status": None, "purpose": purpose, **times}

    def batch_object(self, batch: Batch) -> dict[str, Any]:
        """See `OpenAIDesk`."""
        said = super().batch_object(batch)
        if batch.status == "expired":
            said["status"], said["completed_at"] = "completed", batch.created_at
        said = {name: _iso(value) if name.endswith("_at") else value for name, value in said.items()}
        due = _iso(batch.created_at + int(timedelta(hours=12).total_seconds()))
        del said["expired_at"], said["usage"]
        return {**said, "expected_completion_at": due, "request_params": batch.ordered["request_params"]}

    def model_of(self, ordered: Mapping[str, Any], source: Stored) -> str:
        """See `OpenAIDesk`."""
        params = ordered.get("request_params")
        if not isinstance(params, dict) or params.get("model") not in _MODELS or params.keys() - _FIELDS:
            raise self.refused("Error for argument 'request_params'")
        return str(params["model"])

    def fault_of(self, batch: Batch, line: dict[str, Any]) -> tuple[str, str] | None:
        """See `OpenAIDesk`."""
        if line.keys() != {"custom_id", "body"} or line["body"].keys() != {"input"}:
            return "invalid_request", "Only custom_id and the body's input belong here."
        return None

    def asked(self, batch: Batch, body: dict[str, Any]) -> Asked:
        """See `OpenAIDesk`."""
        return self.emulator._read({**batch.ordered["request_params"], **body}, {}, "")

    def response(self, refusal: RefusalError) -> dict[str, Any]:
        """See `OpenAIDesk`."""
        return {"status_code": refusal.status, "message": orjson.loads(refusal.body)["detail"]}


def _iso(at_s: int | None) -> str | None:
    return None if at_s is None else datetime.fromtimestamp(at_s, UTC).isoformat()
