"""What is known of the vendors' models: that every card makes sense, and when an operator is told of a model's end."""

import itertools
import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from app.errors import ConfigurationError
from app.providers import DIALECTS, SERVERS
from app.providers.cards import KNOWN_ON, ModelCard
from app.runtime import Runtime
from app.settings import CATALOG, Settings, catalog_rows, cautions, json_lines, load, retirements, table
from tests.unit.configurations import SMALL

CARDS = [pytest.param(dialect, model, id=f"{dialect}:{model}") for dialect, model in CATALOG]


@pytest.mark.parametrize(("dialect", "model"), CARDS)
def test_every_card_makes_sense(dialect: str, model: str) -> None:
    """Widths, prices, input types, tiers and dates of a card agree with each other."""
    card = CATALOG[dialect, model]
    assert card.offers(card.dimensions)
    assert card.dimensions > 0
    assert all(type(size) is int and size > 0 for size in (min(card.sizes, default=1), max(card.sizes, default=1)))
    assert isinstance(card.sizes, range) or list(card.sizes) == sorted(set(card.sizes))
    assert card.sizes or not card.matryoshka
    assert card.max_input_tokens >= 256
    prompts = dict(card.prompts)
    assert prompts.keys() <= {"query", "document"}
    assert len(prompts) == len(card.prompts)
    assert card.default_input_type is None or card.default_input_type in prompts
    limits = (card.max_batch_items, card.max_batch_tokens)
    assert all(limit is None or limit > 0 for limit in limits)


@pytest.mark.parametrize(("dialect", "model"), CARDS)
def test_every_models_terms_make_sense(dialect: str, model: str) -> None:
    """Prices are whole pico-USD per token, dearer than nothing; tiers do not shrink; a dead model is not offered."""
    terms = DIALECTS[dialect].terms(model)
    assert terms is not None
    for price in (terms.price, terms.batch_price):
        assert price is None or (type(price) is int and 1_000 <= price <= 10_000_000)
    assert terms.batch_price is None or (terms.price is not None and terms.batch_price <= terms.price)
    numbered = [quota for tier, quota in terms.tiers.items() if tier.isdigit()]
    for less, more in itertools.pairwise(numbered):
        assert less.requests_per_minute <= more.requests_per_minute
        assert less.tokens_per_minute <= more.tokens_per_minute
    assert all(0 < len(tier) <= 128 and tier.isascii() and " " not in tier for tier in terms.tiers)
    assert terms.shutdown is None or terms.shutdown > KNOWN_ON


@pytest.mark.parametrize("wire", [*DIALECTS.values(), *SERVERS.values()], ids=lambda wire: wire.name)
def test_every_dialect_knows_how_it_is_called(wire: Any) -> None:
    """A batch that is full of texts or tokens is one that the settings allow."""
    assert 1 <= wire.max_batch_items <= 2048
    assert 1_000 <= wire.max_batch_tokens <= 10_000_000
    assert wire.judged_spans_s
    assert wire.base_url == "" or wire.base_url.startswith("https://")


@pytest.mark.parametrize(("dialect", "model"), CARDS)
def test_a_known_model_needs_only_dialect_model_and_key(tmp_path: Path, dialect: str, model: str) -> None:
    """All else is in the catalog (but where it is, for vendors who give each customer a host)."""
    host = "" if DIALECTS[dialect].base_url else 'base_url = "https://mine.example/v1"\n'
    facts = of(tmp_path, dialect, model, host).facts("m")
    assert (facts.dimensions, facts.upstream) == (CATALOG[dialect, model].dimensions, model)


def of(folder: Path, dialect: str, model: str, more: str = "") -> Settings:
    """Settings that serve one vendor's model as `m`."""
    path = folder / "embedgate.toml"
    path.write_text(
        f'[deployments.d]\ndialect = "{dialect}"\napi_key = "k"\nmodel = "{model}"\n{more}'
        f'[models.m]\ndeployments = ["d"]\n[stores]\ndata_dir = "{folder}"\n'
    )
    return load(path, {})


def test_the_catalog_is_a_row_per_model_for_people_and_for_programs() -> None:
    """Prices per million tokens; what is not known is `-` or null; columns are aligned."""
    rows = catalog_rows()
    assert len(rows) == len(CATALOG)
    shown = table(rows).splitlines()
    assert len(shown) == len(rows) + 1
    at = shown[0].index("DIMENSIONS")
    assert all(line[at - 1] == " " and line[at] != " " for line in shown)
    small = {
        "dialect": "openai",
        "model": "text-embedding-3-small",
        "dimensions": 1536,
        "sizes": "1-1536",
        "matryoshka": True,
        "max_input_tokens": 8192,
        "tokenizer": "cl100k_base",
        "usd_per_million": 0.02,
        "batch_usd_per_million": 0.01,
        "items_per_call": 2048,
        "unit_vectors_by": "vendor",
        "tiers": ["free", "1", "2", "3", "4", "5"],
        "shutdown": None,
    }
    assert [json.loads(line) for line in json_lines(rows).splitlines()].count(small) == 1


# ── the end of a model ──────────────────────────────────────────────────────────────────────────────────────────────


def ending() -> tuple[str, str, date]:
    """A model of the catalog whose vendor has named a day."""
    found = ((dialect, model, DIALECTS[dialect].terms(model)) for dialect, model in CATALOG)
    return next((dialect, model, card.shutdown) for dialect, model, card in found if card and card.shutdown)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A configuration that serves such a model."""
    dialect, model, _ = ending()
    return of(tmp_path, dialect, model, "" if DIALECTS[dialect].base_url else 'base_url = "https://mine.example/v1"\n')


@pytest.mark.parametrize(
    ("days", "told"),
    [
        (91, None),
        (90, "will be shut down by its vendor in 90 days, on {0}; move to another model"),
        (1, "will be shut down by its vendor in 1 day, on {0}; move to another model"),
        (0, "has been shut down by its vendor since {0}; move to another model"),
        (-400, "has been shut down by its vendor since {0}; move to another model"),
    ],
)
def test_the_operator_is_told_from_90_days_before_a_model_ends(settings: Settings, days: int, told: str | None) -> None:
    """And ever after, in other words."""
    _, model, shutdown = ending()
    said = [line for line in cautions(settings, shutdown - timedelta(days)) if "shut down" in line]
    assert said == ([] if told is None else [f"deployments.d.model: '{model}' {told.format(shutdown)}"])


def test_only_deployments_in_use_end(tmp_path: Path) -> None:
    """Without a date, or without a model that uses it, there is nothing to count."""
    assert retirements(of(tmp_path, "openai", "text-embedding-3-small"), KNOWN_ON) == []


@pytest.mark.parametrize("days", [200, 30, -3])
async def test_a_running_service_counts_the_days_and_logs_when_they_are_few(settings: Settings, days: int) -> None:
    """A gauge for alerts, always; a log line when somebody should act."""
    dialect, model, shutdown = ending()
    log = Path(settings.stores.data_dir) / "log"
    server = settings.server.model_copy(update={"log_file": str(log)})
    logged = settings.model_copy(update={"server": server})
    async with Runtime(logged, today=lambda: shutdown - timedelta(days)) as runtime:
        runtime.tell_retirements()
        scraped = generate_latest(runtime.telemetry.registry).decode()
    assert f'embedgate_model_shutdown_days{{deployment="d",model="{model}"}} {days:.1f}' in scraped, dialect
    events = [json.loads(line) for line in log.read_text().splitlines()]
    told = [event for event in events if event.pop("time") and event["event"] == "model.retires"]
    expected = {
        "event": "model.retires",
        "deployment": "d",
        "model": model,
        "shutdown": shutdown.isoformat(),
        "days": days,
    }
    assert told == ([expected] if days <= 90 else [])


# ── other cautions ──────────────────────────────────────────────────────────────────────────────────────────────────


def cautioned(path: Path) -> list[str]:
    """What `check` warns of."""
    return list(cautions(load(path, {}), KNOWN_ON))


def test_a_vendor_without_limits_is_warned_of_and_so_is_a_lifted_tier(tmp_path: Path) -> None:
    """Quota that nobody stated is found out by 429s; a 0 beside a tier may be a slip."""
    day = KNOWN_ON
    (told,) = cautions(of(tmp_path, "openai", "text-embedding-3-small"), day)
    assert told.startswith("deployments.d.tier: no limits are set")
    assert list(cautions(of(tmp_path, "openai", "text-embedding-3-small", 'tier = "1"\n'), day)) == []
    lifted = of(tmp_path, "openai", "text-embedding-3-small", 'tier = "1"\ntokens_per_minute = 0\n')
    assert list(cautions(lifted, day)) == [
        "deployments.d.tokens_per_minute: 0 is unlimited, although the tier '1' allows 1000000"
    ]


def test_a_tenant_whom_no_outage_model_may_answer_is_warned_of(write: Any) -> None:
    """on_outage widens nobody's rights, which an operator may have expected."""
    text = (
        SMALL + 'on_outage = "mini"\n[deployments.local]\ndialect = "local"\n[models.mini]\ndeployments = ["local"]\n'
    )
    tenant = '[tenants.t]\napi_key = "k"\nmodels = {0}\n'
    assert cautioned(write(text + tenant.format('["bge", "mini"]'))) == []
    assert cautioned(write(text + tenant.format('["mini"]'))) == []
    assert cautioned(write(text + tenant.format('["bge"]'))) == [
        "tenants.t.models: without 'mini', it is never answered by the on_outage of 'bge'"
    ]


def test_a_tenant_whose_batches_no_vendor_takes_is_warned_of(write: Any) -> None:
    """It would pay the ordinary price; at the vendor, or where a price is stated, it does not."""
    tenant = '[tenants.t]\napi_key = "k"\nbulk_tier = "vendor_batch"\n'
    (told,) = cautioned(write(SMALL + tenant))
    assert told.startswith("tenants.t.bulk_tier: no deployment's vendor takes batches")
    vendors = '[deployments.o]\ndialect = "openai"\napi_key = "sk"\nmodel = "text-embedding-3-small"\n{0}'
    vendors += '[models.text-embedding-3-small]\ndeployments = ["o"]\n'
    elsewhere = 'base_url = "https://proxy.example/v1"\n'
    for more, warned in (("tier = '1'\n", 0), (elsewhere, 1), (elsewhere + "batch_usd_per_million_tokens = 1\n", 0)):
        assert sum("bulk_tier" in line for line in cautioned(write(vendors.format(more) + tenant))) == warned


# ── what the composition root makes of it ───────────────────────────────────────────────────────────────────────────


async def test_a_broken_tokenizer_file_is_refused_at_the_start(write: Any, tmp_path: Path) -> None:
    """That it is there is seen in the configuration, that it is one only when it is read."""
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    settings = load(write(SMALL + f'tokenizer = "{file}"\n'), {})
    with pytest.raises(ConfigurationError, match="is not a tokenizer that can be read"):
        await Runtime(settings).__aenter__()


async def test_windows_of_a_local_model_must_overlap_by_less_than_half(write: Any) -> None:
    """How much fits only its files tell."""
    text = '[deployments.local]\ndialect = "local"\n[models.mini]\ndeployments = ["local"]\nlong_input = "mean"\n'
    with pytest.raises(ConfigurationError, match=r"models\.mini\.overlap_tokens: must be less than half of the 256"):
        await Runtime(load(write(text + "overlap_tokens = 128\n"), {})).__aenter__()
    async with Runtime(load(write(text), {})) as runtime:
        assert runtime.gateway.routes["mini"].long_input == "mean"


def test_a_card_without_sizes_offers_only_its_own_width() -> None:
    """And one with sizes offers these, and the width that comes without asking."""
    fixed = ModelCard(dimensions=8, max_input_tokens=512)
    assert (fixed.offers(8), fixed.offers(4)) == (True, False)
    sized = ModelCard(dimensions=8, max_input_tokens=512, sizes=(2, 4))
    assert [size for size in range(10) if sized.offers(size)] == [2, 4, 8]
