"""Hides what of a request has to be bought, texts or the windows that stand for them, and how its answer is made."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from app import vectors
from app.domain import Basket, EmbeddingResult, Route, Vector
from app.engine.intake import Plan, Sized
from app.engine.workitem import Answer


class Part(NamedTuple):
    """Something to buy, and the key of the text that it is or belongs to."""

    sized: Sized
    of: bytes


class Need(NamedTuple):
    """What a request takes, by key: what it has, `hits` of its texts, and the `parts` that it is made of otherwise.

    `measured` are the texts that were missing, `windows` the keys of those that stand for a long one.
    """

    have: dict[bytes, Vector]
    hits: int
    measured: Mapping[bytes, Sized]
    windows: Mapping[bytes, Sequence[bytes]]
    parts: Mapping[bytes, Part]

    def join_windows(self, *, unit: bool) -> dict[bytes, Vector]:
        """The mean of its windows for each long text that is not there; all windows are."""
        joined = {}
        for key, names in self.windows.items():
            if key not in self.have:
                found = [self.have[name] for name in names]
                weights = [each.tokens for each in self.measured[key].windows]
                data = vectors.mean([each.data for each in found], weights, unit=unit)
                joined[key] = Vector(data, sum(each.tokens for each in found))
        return joined


def parts_of(measured: Mapping[bytes, Sized], windows: Mapping[bytes, Sequence[bytes]]) -> dict[bytes, Part]:
    """What has to be bought, by key: each text, or the windows that stand for it; `windows` are their keys."""
    parts: dict[bytes, Part] = {}
    for key, sized in measured.items():
        for name, window in zip(windows.get(key, (key,)), sized.windows or (sized,), strict=True):
            parts.setdefault(name, Part(window, key))
    return parts


def result_of(
    plan: Plan, merged: Sequence[Vector], *, cache_hits: int, joined: int = 0, answers: Collection[Answer] = (),
    bought: Sequence[Answer] = (),
) -> EmbeddingResult:  # fmt: skip
    """Puts the answer together, cut to the width that was asked for; `bought` are the answers that it pays for."""
    data = [vector.data for vector in merged]
    if plan.width is not None:
        data = [vectors.cut(full, plan.width) for full in data]
    tokens = sum([vector.tokens for vector in merged])
    if not answers:
        return EmbeddingResult(data, tokens, plan.space, cache_hits, joined)
    return EmbeddingResult(
        data, tokens, plan.space, cache_hits, joined,
        deployments=tuple(dict.fromkeys(answer.deployment for answer in answers)),
        queue_s=max(answer.queue_s for answer in answers),
        batch_items=max(answer.batch_items for answer in answers),
        calls=_calls(bought),
        cost_nano_usd=_cost(plan.route, bought),
        retries=max(answer.retries for answer in answers),
    )  # fmt: skip


def put(basket: Basket, route: Route, bought: Mapping[bytes, Answer], texts: int) -> None:
    """Keeps what was bought for so many texts of a request that failed."""
    answers, nano_usd = [*bought.values()], basket.nano_usd
    cost = _cost(route, answers)
    basket.vectors.update((key, Vector(answer.data, answer.tokens)) for key, answer in bought.items())
    basket.texts += texts
    basket.calls += _calls(answers)
    basket.nano_usd = None if nano_usd is None or cost is None else nano_usd + cost


def _calls(bought: Sequence[Answer]) -> float:
    return sum(1 / answer.batch_items for answer in bought)


def _cost(route: Route, bought: Sequence[Answer]) -> int | None:
    """What the calls cost that brought these, by the tokens that were billed; None where a price is not known."""
    prices = {deployment.name: deployment.price for deployment in route.deployments}
    costs = [None if (price := prices[each.deployment]) is None else each.tokens * price for each in bought]
    return None if None in costs else sum(cost or 0 for cost in costs) // 1000
