"""What can be seen from outside: log lines and metrics; see `events` for what there is."""

from app.telemetry.events import Telemetry
from app.telemetry.log import LogWriter
from app.telemetry.series import Reading

__all__ = ["LogWriter", "Reading", "Telemetry"]
