"""What can go wrong, sorted by what the one who gets the error should do about it.

Two families that never mix. `EmbedgateError`s are answers to a *caller*: their text is safe to show and only
`api/errors.py` knows what they look like in HTTP. `ProviderError`s are what one *deployment* did to one call: the
dispatcher acts on their class, their text is for logs, and none of them ever reaches a caller as it is.
"""


class EmbedgateError(Exception):
    """An answer to a caller; `str(error)` is the outside text, without key, text or provider words."""


# ── change the request ──────────────────────────────────────────────────────────────────────────────────────────────


class InvalidRequest(EmbedgateError):
    """The request cannot be served as it stands, now or later.

    `param` is the path of the first bad field (`input[1]`); None when the body as a whole is wrong. `code` is the
    stable machine word. `kind` is the error's family on the wire.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.kind = kind


class UnknownModel(EmbedgateError):
    """The model does not exist or this key may not use it: the caller cannot tell which."""

    def __init__(self, model: str) -> None:
        name = "".join(c for c in model[:64] if c.isprintable())
        super().__init__(f"The model `{name}` does not exist or you do not have access to it.")


class RejectedInput(EmbedgateError):
    """Our checks passed but the provider refused this very text; `position` is its place in the caller's input."""

    def __init__(self, position: int | None = None) -> None:
        super().__init__("The provider rejected this input.")
        self.position = position


class NotFound(EmbedgateError):
    """What the request names does not exist, or not for this caller; `param` is the field that names it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = "not_found") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Conflict(EmbedgateError):
    """What is asked for cannot be, as things stand; asking again does not help. `code` is the stable machine word."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class IdempotencyMismatch(EmbedgateError):
    """The idempotency key was used before, for something else."""

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used with another request body.")


# ── change the key ──────────────────────────────────────────────────────────────────────────────────────────────────


class Unauthenticated(EmbedgateError):
    """No key, or none that we know; `code` is None when there was none."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class InsufficientScope(EmbedgateError):
    """The key is right, but not made for this."""

    def __init__(self, scope: str) -> None:
        super().__init__(f"This API key does not have the scope '{scope}'.")


# ── ask for a larger budget ─────────────────────────────────────────────────────────────────────────────────────────


class BatchLimitExceeded(EmbedgateError):
    """The tenant has as many open batches, or as many bytes of files, as it may."""


class BudgetExhausted(EmbedgateError):
    """What is left of a budget does not pay for the request; `account` and `span` say of which."""

    def __init__(self, account: str, span: str) -> None:
        super().__init__("You exceeded your current quota, please check your plan and billing details.")
        self.account = account
        self.span = span


# ── wait ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class RateLimited(EmbedgateError):
    """The caller's tenant is over one of its limits; `retry_after_s` None: this request can never pass.

    `kind` is the scarce dimension, `code` the stable machine word.
    """

    def __init__(
        self, message: str, *, kind: str, retry_after_s: float | None, code: str = "rate_limit_exceeded"
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.kind = kind
        self.code = code
        self.retry_after_s = retry_after_s


class TryAgainLater(EmbedgateError):
    """Embedgate itself cannot serve now; worth another try after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(TryAgainLater):
    """The queue is full, or the request could not have made its deadline."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("The server is overloaded. Please try again later.", retry_after_s)


class ProviderUnavailable(TryAgainLater):
    """Every deployment of the space is out; `retry_after_s` is when the earliest may be probed."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("No provider is available for this model.", retry_after_s)


class ShuttingDown(TryAgainLater):
    """This replica drains; another one will answer."""

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__("The server is shutting down.", retry_after_s)


# ── nothing the caller did ──────────────────────────────────────────────────────────────────────────────────────────


class DeadlineExceeded(EmbedgateError):
    """The request waited or flew too long."""

    def __init__(self) -> None:
        super().__init__("The request timed out before it could be completed.")


class UpstreamFailed(EmbedgateError):
    """All attempts were used up at providers that failed; `code` says whether they failed or answered nonsense."""

    def __init__(self, code: str = "upstream_error") -> None:
        super().__init__("The upstream provider failed.")
        self.code = code


class InternalError(EmbedgateError):
    """A bug of ours."""

    def __init__(self) -> None:
        super().__init__("The server had an error while processing your request.")


# ── what one deployment did to one call ─────────────────────────────────────────────────────────────────────────────


class ProviderError(Exception):
    """One call to one deployment failed; `str(error)` is for logs: never a text, a key or a provider's own words.

    `counted` says whether the provider may have counted the call against its quota: False only when surely nothing was
    sent. `may_cost`: it may have been carried out and be on the bill, for the provider did not say that it was not.
    """

    counted = True
    may_cost = False


class Throttled(ProviderError):
    """The deployment's quota is used up for `retry_after_s` seconds (None: it did not say)."""

    def __init__(self, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class QuotaExhausted(ProviderError):
    """No credit is left: waiting does not help, the operator must act."""


class BadCredential(ProviderError):
    """The deployment does not accept its key: the operator must act."""


class Misconfigured(ProviderError):
    """The deployment does not know the model or the path: the operator must act; no health signal."""


class InputRefused(ProviderError):
    """The provider refused the content of this batch: one of its texts is bad; no health signal.

    `position` is the text that it names, if it names one; `too_long` says that its length is what is wrong.
    """

    def __init__(self, detail: str, *, position: int | None = None, too_long: bool = False) -> None:
        super().__init__(detail)
        self.position = position
        self.too_long = too_long


class Transient(ProviderError):
    """5xx, a reset, an overload: another try may succeed."""


class Unreachable(Transient):
    """No connection was made, so nothing was counted."""

    counted = False


class BrokenOff(Transient):
    """The connection was lost before the answer was complete."""

    may_cost = True


class CallTimeout(Transient):
    """No complete answer within the attempt's time."""

    may_cost = True


class MalformedReply(Transient):
    """The answer was not what was asked for: wrong count, order, dimension, or values that are no vector."""

    may_cost = True


# ── the operator's ──────────────────────────────────────────────────────────────────────────────────────────────────


class ConfigurationError(Exception):
    """The configuration cannot be served; the text names file, line and mend."""
