"""Hides what single values of `embedgate.toml` may be: keys, addresses, numbers in their units, words or numbers."""

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from app import money
from app.errors import ConfigurationError


class Section(BaseModel):
    """A table of the file: frozen, strict, without names that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}").fullmatch


def _secret(value: object, info: ValidationInfo) -> object:
    """What `env:NAME` and `file:/path` stand for; the errors name the place and never show a value."""
    if not isinstance(value, str):
        return value
    secret = _referred(value, (info.context or {}).get("environ", {}))
    if not secret or " " in secret or not (secret.isascii() and secret.isprintable()):
        raise ValueError("the key is empty or has characters that an HTTP header cannot carry")
    return secret


def _referred(reference: str, environ: Mapping[str, str]) -> str:
    scheme, colon, place = reference.partition(":")
    if colon and scheme == "env":
        if place not in environ:
            name = place if _VARIABLE(place) else "that it names"  # who writes the key itself there should not read it
            raise ValueError(f"the environment variable {name} is not set")
        return environ[place]
    if colon and scheme == "file":
        try:
            return Path(place).expanduser().read_text("utf-8").strip()
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"the file {place} cannot be read") from error
    return reference


def _place(path: str) -> str:
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError("begins with a home directory that there is not") from None
    if "\0" in path:
        raise ValueError("must be a path, without a NUL")
    return path


def _store_url(*schemes: str) -> AfterValidator:
    """A URL of one of `schemes`; the errors never show it, since it may hold a password."""

    def check(url: SecretStr | None) -> SecretStr | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url.get_secret_value())
            sound = parts.scheme in schemes and (bool(parts.hostname) or parts.scheme == "sqlite") and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(f"must be a URL that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        return url

    return AfterValidator(check)


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not (url.isascii() and url.isprintable()) or " " in url:
        raise ValueError("must be a URL such as https://api.openai.com/v1")
    if parts.username is not None or parts.password is not None or "?" in url or "#" in url:
        raise ValueError("must hold no credentials, query or fragment; a key belongs into api_key")
    if parts.path.rstrip("/").endswith("/embeddings"):
        raise ValueError("must end before /embeddings, which is added to it")
    return url.rstrip("/")


def server_url(url: str) -> str:
    """Where an embedgate is to be found, without /v1. Raises ConfigurationError, which shows no password."""
    try:
        return _base_url(url).removesuffix("/v1").rstrip("/")
    except ValueError as error:
        raise ConfigurationError(f"{url.rpartition('@')[2]} cannot be asked: it {error}") from None


def webhook_url(url: str) -> str:
    """The URL itself, or "" for none. ValueError for what cannot be called, or holds what belongs elsewhere."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        sound = sound and "@" not in parts.netloc
    except ValueError:
        sound = False
    if url and not (sound and url.isascii() and url.isprintable() and " " not in url and "#" not in url):
        raise ValueError("must be a URL such as https://example.com/hook, without credentials")
    return url


def _budget(dollars: float) -> float:
    money.nano_usd_of(Decimal(repr(dollars)))
    return dollars


def _host(host: str) -> str:
    if not host or not (host.isascii() and host.isprintable()) or set(host) & set(" /[]@"):
        raise ValueError("must be an address or a host name, without scheme and port")
    return host


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("names something twice")
    return values


def _refused_as(text: str) -> WrapValidator:
    """Says `text` once, instead of what is wrong with each alternative."""

    def validate(value: object, inner: ValidatorFunctionWrapHandler) -> object:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(text) from None

    return WrapValidator(validate)


_Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_OneOrMore = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)

FilePath: TypeAlias = Annotated[str, AfterValidator(_place)]
"""Of a file or folder; `~` is a home directory, "" none."""

Secret: TypeAlias = Annotated[SecretStr, BeforeValidator(_secret)]
OptionalSecret: TypeAlias = Annotated[Secret | None, BeforeValidator(lambda value: None if value == "" else value)]
RedisUrl: TypeAlias = Annotated[OptionalSecret, _store_url("redis", "rediss", "redis+cluster", "rediss+cluster")]
DatabaseUrl: TypeAlias = Annotated[OptionalSecret, _store_url("postgresql", "postgres", "sqlite")]
Names: TypeAlias = Annotated[tuple[str, ...], _Listed, Field(min_length=1), AfterValidator(_distinct)]
Secrets: TypeAlias = Annotated[tuple[Secret, ...], _Listed, _OneOrMore, Field(min_length=1)]
SecretsIfAny: TypeAlias = Annotated[
    tuple[Secret, ...], _Listed, _OneOrMore, BeforeValidator(lambda value: () if value == "" else value)
]
Spans: TypeAlias = Annotated[
    tuple[Annotated[float, Field(gt=0, le=3600)], ...], _Listed, Field(min_length=1, max_length=8)
]
Seconds: TypeAlias = Annotated[float, Field(gt=0, le=3600)]
PerMinute: TypeAlias = Annotated[int, Field(ge=0, le=10**12)]
Name: TypeAlias = Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]
"""Names travel in headers and labels."""
OptionalName: TypeAlias = Annotated[str, Field(pattern=r"^[!-~]{0,128}$")]
"""A name, or "" for none."""
BaseUrl: TypeAlias = Annotated[str, AfterValidator(_base_url)]
WebhookUrl: TypeAlias = Annotated[str, Field(max_length=2048), AfterValidator(webhook_url)]
BudgetUsd: TypeAlias = Annotated[float, Field(ge=0, le=money.MOST_USD), AfterValidator(_budget)]
"""What may be spent, in dollars with at most nine decimals; 0 for no bound."""
Host: TypeAlias = Annotated[str, AfterValidator(_host)]
ApiVersion: TypeAlias = Annotated[
    Annotated[str, Field(pattern=r"^[0-9A-Za-z.-]{0,64}$")], _refused_as('must be a version such as "2024-10-21"')
]
Jitter: TypeAlias = Annotated[
    Literal["full"] | Annotated[float, Field(ge=0, le=1)], _refused_as('must be "full" or a share from 0 to 1')
]
Spill: TypeAlias = Annotated[
    Literal["wait", "now"] | Annotated[float, Field(ge=0, le=3_600_000)],
    _refused_as('must be "wait", "now" or milliseconds from 0 to 3600000'),
]
