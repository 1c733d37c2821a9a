"""Hides who is told when a budget is spent in part or in whole: the log, the metrics, and the tenant's webhook."""

import asyncio
import base64
import hashlib
import hmac
import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, Protocol, Self

import httpx
import msgspec

from app import money
from app.domain import Allowance
from app.storage.level import LevelDown
from app.storage.secret import MasterSecret
from app.storage.sql.alerts import Alert, SqlAlerts
from app.telemetry import Telemetry

PERCENTS: Final = (50, 80, 100)

_LOOK_S, _TRIM_LOOKS, _KEEP_DAYS = 5.0, 720, 400
_WITHIN_S = 5.0
_AT_ONCE = 32  # tenants that are told at one moment
_DOUBT_S = 60.0  # so long after a refusal the books may show that it was the end
_MOST_RAISED, _MOST_REFUSED = 100_000, 1000


class Terms(Protocol):
    """Of an account; see `directory.Terms`."""

    @property
    def tenant(self) -> str: ...  # noqa: D102
    @property
    def allowance(self) -> Allowance: ...  # noqa: D102
    @property
    def webhook_url(self) -> str: ...  # noqa: D102


class Alerts:
    """Follows what is spent; an async context manager that owns its task and its connections.

    Of all replicas the one that writes an alert down first tells the log and the metrics of it. The webhook is called
    until it answers 2xx, at the times of `AGAIN_S`, by whichever replica is there; so it may hear twice, and tells by
    the id. A tenant hears of one after the other, and whoever is slow keeps nobody else waiting. Messages are as
    Standard Webhooks has them, see `webhook_secret`. `terms` finds what an account may spend; `ready`: whether the
    database is ours to ask by now.
    """

    def __init__(
        self, sql: SqlAlerts, secret: MasterSecret, telemetry: Telemetry, *, terms: Callable[[str], Terms | None],
        ready: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        self._ready = ready
        self._sql = sql
        self._secret = secret
        self._telemetry = telemetry
        self._terms = terms
        self._raised: dict[tuple[str, str], tuple[int, int]] = {}  # the budget, and how much of it was told
        self._refused: dict[tuple[str, str], float] = {}  # until when it matters
        self._waiting: dict[tuple[str, str, int], int] = {}  # the budget
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        # Without the client around it, which logs URLs, and whose redirects and cookies nobody wants.
        self._caller: httpx.AsyncHTTPTransport | None = None
        self._tasks = asyncio.TaskGroup()
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._following = self._tasks.create_task(self._follow(), name="alerts")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in filter(None, (self._following, *self._telling.values())):
            task.cancel()  # what was not taken is told again
        await self._tasks.__aexit__(None, None, None)
        if self._caller is not None:
            await self._caller.aclose()

    # ── what the ledger and the budgets tell ────────────────────────────────────────────────────────────────────────

    def ended(self, account: str, day: int, nano_usd: int) -> None:
        """See `ledger.Watcher`; what counts is what is booked."""

    def booked(self, account: str, span: str, nano_usd: int) -> None:
        """See `ledger.Watcher`."""
        budget = self._budget(account, span)
        if budget is not None:
            self._raise(account, span, budget, nano_usd)

    def settled(self, replica: str) -> None:
        """See `ledger.Watcher`."""

    def exhausted(self, account: str, span: str) -> None:
        """What is left did not pay for a request: if most is spent, what is left counts as spent.

        Else it was the request that was large, or what was set aside comes back.
        """
        budget = self._budget(account, span)
        told = self._raised.get((account, span)) == (budget, PERCENTS[-1])
        if budget is not None and not told and len(self._refused) < _MOST_REFUSED:
            self._refused.setdefault((account, span), asyncio.get_running_loop().time() + _DOUBT_S)

    def _budget(self, account: str, span: str) -> int | None:
        terms = self._terms(account)
        if terms is None:
            return None
        return terms.allowance.per_month if len(span) == len("2026-11") else terms.allowance.per_day

    def _raise(self, account: str, span: str, budget: int, spent: int) -> None:
        known, upto = self._raised.get((account, span), (0, 0))
        upto = upto if known == budget else 0
        new = [percent for percent in PERCENTS if percent > upto and 100 * spent >= percent * budget]
        if not new:
            return
        if len(self._raised) >= _MOST_RAISED:
            self._raised.clear()  # the database knows, too
        self._raised[account, span] = (budget, new[-1])
        self._waiting |= {(account, span, percent): budget for percent in new}
        self._wake.set()

    # ── telling ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _follow(self) -> None:
        for look in itertools.count():
            try:
                if self._ready():
                    await self._look(trims=look % _TRIM_LOOKS == 0)
            except LevelDown:
                pass
            except Exception as bug:  # supervision is for the errors that nobody thought of
                self._telemetry.loop_crashed(loop="alerts", error=bug)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            self._wake.clear()

    async def _look(self, *, trims: bool) -> None:
        if self._refused:
            await self._judge()
        await self._begin()
        await self._tell()
        if trims:
            await self._sql.trim(_KEEP_DAYS)

    async def _judge(self) -> None:
        """Finds out for whom a refusal was the end of the budget."""
        spent, now = await self._sql.spent([*self._refused]), asyncio.get_running_loop().time()
        for (account, span), until in [*self._refused.items()]:
            budget = self._budget(account, span)
            ends = budget is not None and 100 * spent.get((account, span), 0) >= PERCENTS[-2] * budget
            if budget is not None and ends:
                self._raise(account, span, budget, budget)
            if budget is None or ends or until < now:
                del self._refused[account, span]

    async def _begin(self) -> None:
        """Writes down what nobody else has, and tells of it."""
        while self._waiting:
            (account, span, percent), budget = next(iter(self._waiting.items()))
            terms = self._terms(account)
            if terms is not None and await self._sql.begin(
                account, span, percent, budget, tells=bool(terms.webhook_url)
            ):
                self._telemetry.budget_alerted(
                    tenant=terms.tenant, account=account, span=span, percent=percent, budget=money.usd(budget)
                )
            if self._waiting[account, span, percent] == budget:  # else it was raised meanwhile
                del self._waiting[account, span, percent]

    async def _tell(self) -> None:
        """Begins to deliver what is due, as far as there is room."""
        first: dict[str, Alert] = {}
        for alert in await self._sql.due():
            first.setdefault(self._whom(alert), alert)
        idle = [alert for whom, alert in first.items() if whom not in self._telling]
        wanted = idle[: _AT_ONCE - len(self._telling)]
        if not wanted:
            return
        if self._caller is None:
            self._caller = await asyncio.to_thread(httpx.AsyncHTTPTransport, trust_env=False)  # reads all certificates
        caller = self._caller
        for alert in await self._sql.claim(wanted):
            whom = self._whom(alert)
            self._telling[whom] = self._tasks.create_task(self._deliver(caller, whom, alert))

    def _whom(self, alert: Alert) -> str:
        """Who hears of it; of one account only, if it is not known whose."""
        terms = self._terms(alert.account)
        return alert.account if terms is None else terms.tenant

    async def _deliver(self, caller: httpx.AsyncBaseTransport, whom: str, alert: Alert) -> None:
        """One attempt; never raises."""
        try:
            await self._attempt(caller, alert)
        except LevelDown:
            pass  # it is told again
        except Exception as bug:
            self._telemetry.loop_crashed(loop="alerts", error=bug)
        finally:
            self._telling.pop(whom, None)
            self._wake.set()  # there may be another for them

    async def _attempt(self, caller: httpx.AsyncBaseTransport, alert: Alert) -> None:
        terms = self._terms(alert.account)
        if terms is None:
            return  # nobody's any more, or of somebody whom this replica does not know yet
        if terms.webhook_url:
            body = _body(terms, alert)
            outcome = await _post(caller, terms.webhook_url, body, _headers(self._secret, terms.tenant, alert, body))
            self._telemetry.alert_delivered(
                tenant=terms.tenant, percent=alert.percent, attempts=alert.attempts, outcome=outcome
            )
            if outcome != "ok":
                return
        await self._sql.delivered(alert)


async def _post(caller: httpx.AsyncBaseTransport, url: str, body: bytes, headers: Mapping[str, str]) -> str:
    """What became of it, without a word of theirs."""
    try:
        request = httpx.Request("POST", url, content=body, headers=headers)
        async with asyncio.timeout(_WITHIN_S):
            response = await caller.handle_async_request(request)
            await response.aclose()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:  # ValueError: a host that is no name
        return type(error).__name__
    return "ok" if response.is_success else f"HTTP {response.status_code}"


def webhook_secret(secret: MasterSecret, tenant: str) -> str:
    """With what the tenant checks that a message is ours, as libraries for Standard Webhooks take it."""
    return "whsec_" + base64.b64encode(secret.derive(_purpose(tenant))).decode()


def _purpose(tenant: str) -> str:
    return f"webhooks of {tenant}"


def _body(terms: Terms, alert: Alert) -> bytes:
    kind, _, name = alert.account.partition(" ")
    data = {
        "tenant": terms.tenant, "scope": kind, "name": name.rpartition("/")[2] if kind == "project" else name,
        "period": alert.span, "percent": alert.percent, "budget_usd": money.usd(alert.budget_nano_usd),
    }  # fmt: skip
    at = datetime.fromtimestamp(alert.at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return msgspec.json.encode({"type": "budget.alert", "timestamp": at.replace("+00:00", "Z"), "data": data})


def _headers(secret: MasterSecret, tenant: str, alert: Alert, body: bytes) -> Mapping[str, str]:
    """Signed with every secret that may be known to them, the newest first."""
    what = f"{alert.account} {alert.span} {alert.percent} {alert.budget_nano_usd}"
    name, at = f"msg_{hashlib.blake2b(what.encode(), digest_size=12).hexdigest()}", str(int(time.time()))
    keys = [secret.derive(_purpose(tenant)), *secret.derive_older(_purpose(tenant))]
    signed = f"{name}.{at}.".encode() + body
    signatures = [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in keys]
    return {
        "webhook-id": name,
        "webhook-timestamp": at,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
        "content-type": "application/json",
        "user-agent": "embedgate",
    }
