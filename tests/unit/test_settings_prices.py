"""What a token costs, as configured, as published or unknown, and what may be spent: to the last digit."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import NO_BOUND, Allowance
from app.providers.cards import KNOWN_ON
from app.settings import RemoteDeployment, cautions, describe, load
from tests.unit.configurations import SMALL, refusal

DEPLOYMENT = '[deployments.d]\ndialect = "{}"\napi_key = "k"\nmodel = "{}"\n{}\n[models.m]\ndeployments = ["d"]\n'
OPENAI = DEPLOYMENT.format("openai", "text-embedding-3-small", "{}")
LOCAL = '[deployments.d]\ndialect = "local"\n{}\n[models.m]\ndeployments = ["d"]\n'
PRICED = "usd_per_million_tokens = 0\n[models"
PRICES = "usd_per_million_tokens = {}\nbatch_usd_per_million_tokens = {}"


def bought(path: Path, **environ: str) -> tuple[int | None, int | None, str]:
    """Price, batch price and source of the one deployment."""
    (deployment,) = load(path, environ).deployments.values()
    return deployment.price, deployment.batch_price, deployment.price_source


@given(st.integers(0, 10**12))
def test_every_price_with_six_decimals_is_exact(pico: int) -> None:
    """Up to a million dollars, whatever a float makes of it on its way."""
    stated = float(Decimal(pico).scaleb(-6))
    entry = {"dialect": "openai", "model": "m", "base_url": "http://h/v1", "usd_per_million_tokens": stated}
    assert RemoteDeployment.model_validate(entry).price == pico


@pytest.mark.parametrize(
    ("text", "price", "batch_price", "source"),
    [
        (OPENAI.format(""), 20_000, 10_000, f"catalog of {KNOWN_ON}"),
        (OPENAI.format(PRICES.format("0.13", "0.065")), 130_000, 65_000, "configured"),
        (OPENAI.format(PRICES.format("0", "0")), 0, 0, "configured"),
        (OPENAI.format("usd_per_million_tokens = 1"), 1_000_000, 10_000, "configured"),
        (OPENAI.format("batch_usd_per_million_tokens = 0.000001"), 20_000, 1, f"catalog of {KNOWN_ON}"),
        (LOCAL.format(""), 0, 0, "local"),
        (LOCAL.format("usd_per_million_tokens = 0.002"), 2000, 0, "configured"),
        (DEPLOYMENT.format("jina", "jina-embeddings-v3", ""), None, None, "unknown"),
        (SMALL, None, None, "unknown"),
    ],
)
def test_the_operators_word_goes_before_the_catalogs(
    write: Any, text: str, price: int | None, batch_price: int | None, source: str
) -> None:
    """Each of both prices for itself; what nobody says is unknown and not nothing."""
    assert bought(write(text)) == (price, batch_price, source)


def test_the_environment_states_prices_too(write: Any) -> None:
    """As exactly as the file."""
    priced = bought(write(OPENAI.format("")), EMBEDGATE_DEPLOYMENTS__D__USD_PER_MILLION_TOKENS="0.123457")
    assert priced == (123_457, 10_000, "configured")


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("0.0000001", "must have at most 6 decimals"),
        ("0.1234567", "must have at most 6 decimals"),
        ("-0.1", "must be at least 0"),
        ("1000000.1", "must be at most 1e+06"),
        ("nan", "must be a finite number"),
        ('"0.13"', "must be a number"),
    ],
)
def test_a_price_that_could_not_be_booked_as_stated_is_refused(write: Any, stated: str, said: str) -> None:
    """With its line."""
    (line,) = refusal(write(OPENAI.format(f"usd_per_million_tokens = {stated}")))
    assert "usd_per_million_tokens" in line
    assert said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            OPENAI.format(""),
            f"# price: 0.02 USD per million tokens, 0.01 in the vendor's batches (catalog of {KNOWN_ON}",
        ),
        (
            OPENAI.format("usd_per_million_tokens = 123456.789012"),
            "# price: 123456.789012 USD per million tokens, 0.01",
        ),
        (LOCAL.format(""), "# price: 0 USD per million tokens (local)"),
        (SMALL, "# price: unknown, so tokens are counted without money; set usd_per_million_tokens"),
    ],
)
def test_the_description_says_what_a_token_costs_and_who_says_so(write: Any, text: str, said: str) -> None:
    """Every digit of it, or that nobody knows."""
    assert said in describe(load(write(text), {}))


@pytest.mark.parametrize(
    ("text", "tenant", "told"),
    [
        (SMALL, "budget_usd_per_month = 1", True),
        (SMALL, 'budget_usd_per_day = 1\nmodels = ["bge"]', True),
        (SMALL, "budget_usd_per_day = 0", False),
        (SMALL, "", False),
        (SMALL.replace("[models", PRICED), "budget_usd_per_month = 1", False),
        (SMALL + '[models.other]\ndeployments = ["main"]\ndimensions = 384\n',
         'budget_usd_per_month = 1\nmodels = ["other"]', True),
        (OPENAI.format("") + '[models.bge]\ndeployments = ["far"]\ndimensions = 384\n'
         + SMALL.split("[models")[0].replace("main", "far"), 'budget_usd_per_month = 1\nmodels = ["m"]', False),
    ],
    ids=["unknown", "one model", "no bound", "no budget", "known", "another name", "another model"],
)  # fmt: skip
def test_a_budget_over_a_price_that_nobody_knows_is_told(write: Any, text: str, tenant: str, told: bool) -> None:
    """Only where a tenant with a budget may use the model, and its price is unknown."""
    settings = load(write(f'{text}[tenants.t]\napi_key = "k"\n{tenant}\n'), {})
    said = [line for line in cautions(settings, KNOWN_ON) if "price" in line]
    assert bool(said) is told
    for line in said:
        assert line.startswith("deployments.main.usd_per_million_tokens: the price is not known, so the budget of t ")


def test_what_tenants_may_spend_is_exact_and_shown(write: Any) -> None:
    """To the nano-dollar, 0 for no bound; of a webhook's URL the query is shown to nobody, for it may open it."""
    hook = "https://example.com/hook?token=hunter2"
    text = f'{SMALL}[tenants.t]\napi_key = "k"\nbudget_usd_per_day = 0.000000001\nwebhook_url = "{hook}"\n'
    settings = load(write(text), {"EMBEDGATE_TENANTS__T__BUDGET_USD_PER_MONTH": "1234567.1"})
    tenant = settings.tenants["t"].tenant("t")
    assert (tenant.allowance, tenant.webhook_url) == (Allowance(1, 1_234_567_100_000_000), hook)
    shown = describe(settings)
    assert "budget_usd_per_month = 1234567.1" in shown
    assert 'webhook_url = "https://example.com/hook?***"' in shown
    assert load(write(shown), {}).tenants["t"].allowance == tenant.allowance
    unbound = load(write(SMALL + '[tenants.t]\napi_key = "k"\nbudget_usd_per_day = 0\n'), {}).tenants["t"].tenant("t")
    assert (unbound.allowance, unbound.webhook_url) == (NO_BOUND, "")
