"""Hides what answers to probes mean to the operator: how they compare with what is configured, and what is wrong."""

from collections.abc import Iterator

from app.engine.canary import Finding
from app.ports import Stated
from app.settings.catalog import usd_per_million
from app.settings.grammar import Settings
from app.settings.tables import Row


def verdict(settings: Settings, finding: Finding) -> Row:
    """What one deployment answered, beside what is configured; `wrong` is empty if all is well.

    Limits are per minute; None where the vendor does not state one, or none is configured.
    """
    deployment = settings.deployments[finding.deployment]
    limits, stated = deployment.limits(), finding.stated or Stated()
    return {
        "model": finding.model,
        "deployment": finding.deployment,
        "latency_ms": None if finding.latency_s is None else round(finding.latency_s * 1000),
        "dimensions": finding.dimensions,
        "cosine": None if finding.cosine is None else round(finding.cosine, 6),
        "requests_stated": stated.requests_per_minute,
        "requests_configured": limits.requests_per_minute or None,
        "tokens_stated": stated.tokens_per_minute,
        "tokens_configured": limits.tokens_per_minute or None,
        "usd_per_million": usd_per_million(deployment.price),
        "price_from": deployment.price_source,
        "wrong": list(_wrong(settings, finding, stated)),
    }


def _wrong(settings: Settings, finding: Finding, stated: Stated) -> Iterator[str]:
    if finding.error:
        yield finding.error
    least = settings.models[finding.model].canary_cosine
    if finding.cosine is not None and finding.cosine < least:
        yield f"cosine below {least:g}: not the vectors that were accepted"
    limits = settings.deployments[finding.deployment].limits()
    for what in ("requests", "tokens"):
        has, configured = (getattr(each, f"{what}_per_minute") for each in (stated, limits))
        if has is not None and has < configured:
            yield f"the account has {has} {what} per minute, {configured} are configured"
