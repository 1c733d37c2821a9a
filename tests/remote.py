"""A dialect at an emulator, as the composition root would build it."""

from app.providers.dialect import Dialect, Target
from app.providers.http import Endpoint
from app.providers.remote import RemoteProvider


def remote(
    wire: type[Dialect],
    base_url: str,
    key: str | None,
    model: str,
    *,
    any_name: bool = False,
    options: dict[str, str] | None = None,
    max_in_flight: int = 8,
) -> RemoteProvider:
    """The Provider for `model`."""
    names = frozenset() if any_name else frozenset({model})
    dialect = wire(Target(model, wire.models.get(model), names, options or {}))
    endpoint = Endpoint(base_url, {} if key is None else dialect.headers(key), max_connections=max_in_flight)
    return RemoteProvider(dialect, endpoint)
