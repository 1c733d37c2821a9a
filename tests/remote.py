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
    width: int | None = None,
    any_name: bool = False,
    options: dict[str, str] | None = None,
    max_in_flight: int = 8,
) -> RemoteProvider:
    """The Provider for `model`; of a `width` that is not the model's own, it asks for that."""
    card = wire.models.get(model)
    full = card.dimensions if card else 1536
    wanted = width or full
    target = Target(
        model,
        dimensions=wanted if wanted != full else None,
        names=frozenset() if any_name else frozenset({model}),
        options=options or {},
    )
    dialect = wire(target)
    endpoint = Endpoint(base_url, {} if key is None else dialect.headers(key), max_connections=max_in_flight)
    normalise = card is not None and (
        card.normalised == "never" or (card.normalised == "full width" and wanted != full)
    )
    return RemoteProvider(dialect, endpoint, width=wanted, normalise=normalise)
