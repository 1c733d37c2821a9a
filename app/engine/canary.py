"""Hides how it is noticed that a deployment's vectors are no longer those of its Space."""

from dataclasses import dataclass

from app.ports import Stated


@dataclass(frozen=True, slots=True)
class Finding:
    """What one deployment of one model answered to the probes.

    `error` is empty, or says in our words why there was no answer (then only `latency_s` may be known). `cosine` is
    the lowest to the accepted vectors of its Space; None: these are the first. `dimensions` is the vectors' width.
    """

    model: str
    deployment: str
    space: str
    error: str = ""
    latency_s: float | None = None
    dimensions: int | None = None
    cosine: float | None = None
    tokens_billed: int | None = None
    stated: Stated | None = None
