"""The configuration: what is understood, what overrides it, and that keys never show."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Attempts, BreakerPolicy, Limits, Priority, Tenant
from app.errors import ConfigurationError
from app.providers.self_hosted import TextEmbeddingsInference
from app.settings import LocalDeployment, RemoteDeployment, Settings, describe, find, load
from app.settings.grammar import FIELDS
from tests.unit.configurations import SMALL

# ── what is understood ──────────────────────────────────────────────────────────────────────────────────────────────


LOCAL_PATH = '[deployments.l]\ndialect = "local"\npath = "{}"\n[models.m]\ndeployments = ["l"]\n'


def test_without_configuration_the_local_model_is_served_to_this_machine() -> None:
    """No file at all is one local deployment, one model, loopback and no keys."""
    settings = load(None, {})
    assert settings.server.loopback
    assert settings.server.port == 8080
    assert list(settings.models) == ["all-MiniLM-L6-v2"]
    assert isinstance(settings.deployments["local"], LocalDeployment)
    assert settings.deployments["local"].model == "all-MiniLM-L6-v2"
    assert not settings.tenants


def test_a_file_without_deployments_keeps_the_local_model(write: Any) -> None:
    """Only the port changed: the embedded default stays."""
    settings = load(write("[server]\nport = 9\n"), {})
    assert settings.server.port == 9
    assert list(settings.models) == ["all-MiniLM-L6-v2"]


def test_a_full_configuration_becomes_the_nouns_of_the_domain(write: Any) -> None:
    """Limits, attempts, breaker and tenant carry the file's values in the domain's units."""
    text = SMALL.replace(
        'model = "bge-small"',
        'model = "bge-small"\nwindow_ms = 20\nmax_in_flight = 4\nrequests_per_minute = 60\njudged_spans_s = [1, 60]\n'
        "attempts = 2\nbackoff_cap_s = 4\nbreaker_open_s = 2",
    )
    text += (
        '[tenants.search]\napi_key = ["key-one", "key-two"]\nweight = 2\npriority = "interactive"\nmodels = ["bge"]\n'
    )
    settings = load(write(text), {})
    deployment = settings.deployments["main"]
    assert deployment.limits() == Limits(60, 0, 4, window_s=0.02, judged_spans_s=(1.0, 60.0))
    assert deployment.retry() == Attempts(2, 0.5, 4.0)
    assert deployment.breaker(alone=False) == BreakerPolicy(open_s=2.0)
    assert settings.tenants["search"].tenant("search") == Tenant(
        "search", 2.0, Priority.INTERACTIVE, frozenset({"bge"})
    )
    assert [key.get_secret_value() for key in settings.tenants["search"].api_key] == ["key-one", "key-two"]


def test_defaults_are_those_of_the_domain(write: Any) -> None:
    """A deployment that names no limits has the domain's."""
    deployment = load(write(SMALL), {}).deployments["main"]
    assert (deployment.limits(), deployment.retry(), deployment.breaker(alone=False)) == (
        Limits(),
        Attempts(),
        BreakerPolicy(),
    )


OPENAI = '[deployments.d]\ndialect = "openai"\napi_key = "k"\nmodel = "text-embedding-3-small"\n{0}\n'
OPENAI += '[models.m]\ndeployments = ["d"]\n{1}\n'


@pytest.mark.parametrize(
    ("stated", "requests", "tokens"),
    [
        ("", 0, 0),
        ('tier = "1"', 3000, 1_000_000),
        ('tier = "1"\nheadroom = 0.9', 2700, 900_000),
        ("requests_per_minute = 100\ntokens_per_minute = 150000\nheadroom = 0.9", 90, 135_000),
        ('tier = "1"\nrequests_per_minute = 50', 50, 1_000_000),
        ('tier = "1"\ntokens_per_minute = 0\nheadroom = 0.5', 1500, 0),
        ("requests_per_minute = 1\nheadroom = 0.5", 1, 0),
    ],
)
def test_quotas_come_from_the_file_then_the_tier_and_headroom_lowers_both(
    write: Any, stated: str, requests: int, tokens: int
) -> None:
    """What the file says counts, 0 included; and no headroom turns a small quota into none."""
    limits = load(write(OPENAI.format(stated, "")), {}).deployments["d"].limits()
    assert (limits.requests_per_minute, limits.tokens_per_minute) == (requests, tokens)


@pytest.mark.parametrize(
    ("stated", "jitter"), [("", None), ('jitter = "full"', None), ("jitter = 0.2", 0.2), ("jitter = 0", 0.0)]
)
def test_waits_between_tries_are_the_operators(write: Any, stated: str, jitter: float | None) -> None:
    """4, 8, 16 s without jitter, or 1 to 32 s give or take a fifth: both can be said."""
    text = f"backoff_base_s = 4\nbackoff_cap_s = 16\ncooldown_s = 2.5\ncooldown_cap_s = 300\n{stated}"
    retry = load(write(OPENAI.format(text, "")), {}).deployments["d"].retry()
    assert retry == Attempts(3, 4, 16, jitter, 2.5, 300)


@pytest.mark.parametrize(
    ("spill", "seconds"), [('"wait"', math.inf), ('"now"', 0.0), ("0", 0.0), ("250", 0.25), ("2.5", 0.0025)]
)
def test_spill_is_a_word_or_milliseconds(write: Any, spill: str, seconds: float) -> None:
    """Whole or broken, in the file as in the environment."""
    path = write(OPENAI.format("", f"spill = {spill}"))
    assert load(path, {}).models["m"].spill_s == seconds
    assert load(path, {"EMBEDGATE_MODELS__M__SPILL": "12.5"}).models["m"].spill_s == 0.0125
    assert load(path, {"EMBEDGATE_MODELS__M__SPILL": "now"}).models["m"].spill_s == 0.0


def test_small_batches_lower_what_they_may_shrink_to(write: Any) -> None:
    """Who only makes batches smaller need not name the floor of their adapting."""
    limits = load(write(OPENAI.format("max_batch_tokens = 500", "")), {}).deployments["d"].limits()
    assert (limits.max_batch_tokens, limits.min_batch_tokens) == (500, 500)


def test_a_server_brings_its_own_wire_and_limits(write: Any) -> None:
    """What is peculiar to TEI holds for it although it is of OpenAI's dialect, and it needs no key."""
    text = SMALL.replace('model = "bge-small"', 'model = "bge-small"\nserver = "tei"')
    deployment = load(write(text), {}).deployments["main"]
    assert isinstance(deployment, RemoteDeployment)
    assert (deployment.wire, deployment.limits().max_batch_items) == (TextEmbeddingsInference, 32)
    assert not deployment.understands_token_ids


def test_prompts_of_the_file_stand_beside_those_of_the_catalog(write: Any) -> None:
    """A model of one's own tells input types apart by what the file says; a vendor's by its own words."""
    own = load(write(SMALL + 'query_prompt = "query: "\ndocument_prompt = ""\ninput_type = "document"\n'), {})
    assert dict(own.facts("bge").prompts) == {"query": "query: ", "document": ""}
    assert own.facts("bge").default_input_type == "document"
    vendors = (
        '[deployments.d]\ndialect = "voyage"\napi_key = "k"\nmodel = "voyage-4"\n[models.m]\ndeployments = ["d"]\n'
    )
    assert set(dict(load(write(vendors), {}).facts("m").prompts)) == {"query", "document"}


def test_a_tokenizer_file_makes_counts_exact(write: Any, tmp_path: Path) -> None:
    """It is looked for where the path says, `~` included, and only then the count is no estimate."""
    (tmp_path / "tokenizer.json").touch()
    named = load(write(SMALL + f'tokenizer = "{tmp_path}/tokenizer.json"\nlong_input = "mean"\n'), {})
    assert named.facts("bge").counts_exactly
    assert not load(write(SMALL), {}).facts("bge").counts_exactly
    assert load(None, {}).facts("all-MiniLM-L6-v2").counts_exactly


def test_an_outage_model_is_named_but_widens_nobodys_rights(write: Any) -> None:
    """A tenant of one model may not use the other one because it stands in."""
    text = OPENAI.format("", 'on_outage = "mini"')
    text += '[deployments.local]\ndialect = "local"\n[models.mini]\ndeployments = ["local"]\n'
    settings = load(write(text + '[tenants.t]\napi_key = "k"\nmodels = ["m"]\n'), {})
    assert settings.models["m"].on_outage == "mini"
    assert not settings.tenants["t"].tenant("t").may_use("mini")


def test_the_catalog_fills_in_what_is_known_of_openai_models(write: Any) -> None:
    """Dimensions, longest input, vocabulary and Matryoshka need no configuration for OpenAI's models."""
    text = '[deployments.d]\ndialect = "openai"\napi_key = "k"\nmodel = "{0}"\n[models.m]\ndeployments = ["d"]\n'
    large = load(write(text.format("text-embedding-3-large")), {}).facts("m")
    assert (large.dimensions, large.max_input_tokens, large.tokenizer) == (3072, 8192, "cl100k_base")
    assert large.cuts_dimensions
    assert large.unit_norm
    ada = load(write(text.format("text-embedding-ada-002")), {}).facts("m")
    assert (ada.dimensions, ada.cuts_dimensions) == (1536, False)


def test_an_unknown_model_is_estimated_and_never_cut_unless_the_operator_says_so(write: Any) -> None:
    """Outside the catalog only the configuration speaks."""
    facts = load(write(SMALL), {}).facts("bge")
    assert (facts.dimensions, facts.max_input_tokens, facts.tokenizer) == (384, 8192, "estimate")
    assert not facts.cuts_dimensions
    told = load(write(SMALL + 'cuts_dimensions = true\nmax_input_tokens = 512\ntokenizer = "cl100k_base"\n'), {})
    facts = told.facts("bge")
    assert (facts.cuts_dimensions, facts.max_input_tokens, facts.tokenizer) == (True, 512, "cl100k_base")


def test_a_local_model_leaves_to_its_files_what_they_say() -> None:
    """Nothing is assumed about a local model."""
    facts = load(None, {}).facts("all-MiniLM-L6-v2")
    assert (facts.dimensions, facts.max_input_tokens, facts.tokenizer) == (None, None, None)


def test_token_ids_are_native_only_at_openai(write: Any) -> None:
    """Compatible servers get text unless the operator says that they know the ids."""
    openai = OPENAI.format("", "")
    for text, native in [
        (openai, True),
        (SMALL, False),
        (SMALL.replace("[models", "takes_token_ids = true\n[models"), True),
        (openai.replace("api_key", 'base_url = "https://api.openai.com.evil.example/v1"\napi_key'), False),
    ]:
        (deployment,) = load(write(text), {}).deployments.values()
        assert isinstance(deployment, RemoteDeployment)
        assert deployment.understands_token_ids is native


def test_the_file_is_found_by_option_then_environment_then_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--config` wins over EMBEDGATE_CONFIG, which wins over ./embedgate.toml."""
    monkeypatch.chdir(tmp_path)
    assert find(None, {}) is None
    Path("embedgate.toml").touch()
    assert find(None, {}) == Path("embedgate.toml")
    assert find(None, {"EMBEDGATE_CONFIG": "b.toml"}) == Path("b.toml")
    assert find(Path("a.toml"), {"EMBEDGATE_CONFIG": "b.toml"}) == Path("a.toml")


NEEDED_KEYS = ("EMBEDGATE_API_KEY", "EMBEDGATE_ADMIN_KEY", "OPENAI_API_KEY", "AZURE_API_KEY")
RARELY_NEEDED = {name for name in FIELDS["deployments"] if name.startswith("breaker_")} | {
    "judged_spans_s", "max_batch_bytes", "takes_token_ids", "cuts_dimensions", "token_ids", "same_space",
}  # fmt: skip


def test_the_example_configuration_is_accepted_and_so_is_all_that_it_offers(tmp_path: Path) -> None:
    """deploy/embedgate.toml loads as it is, and with every commented line made real."""
    example = Path(__file__).parents[2] / "deploy" / "embedgate.toml"
    environ = {name: f"key-{name}" for name in NEEDED_KEYS}
    assert list(load(example, environ).tenants) == ["default"]
    lines = example.read_text("utf-8").splitlines()
    real = [line[2:] if line.startswith("# ") and (" = " in line or line.startswith("# [")) else line for line in lines]
    whole = tmp_path / "whole.toml"
    whole.write_text("\n".join(real), "utf-8")
    settings = load(whole, environ)
    assert list(settings.deployments) == ["local", "openai-main", "azure-eu", "tei"]
    for section in ("deployments", "models"):
        offered = {key for entry in getattr(settings, section).values() for key in entry.model_fields_set}
        missing = FIELDS[section].keys() - offered - RARELY_NEEDED
        assert not missing, f"a starting configuration should show {missing}"


def test_later_names_with_their_default_are_accepted(write: Any) -> None:
    """A file written for a later version works as long as it asks for nothing that this one lacks."""
    settings = load(
        write(
            '[server]\nworkers = 1\nadmin_port = 0\n[stores]\nredis_url = ""\nmax_replicas = 4\n'
            '[cache]\nfloat16 = false\nredis_ttl_s = 604800\n[deployments.local]\ndialect = "local"\ntier = ""\n'
            '[models.m]\ndeployments = ["local"]\non_outage = ""\norder = "listed"\nspill = "wait"\n'
        ),
        {},
    )
    assert list(settings.models) == ["m"]


# ── the environment ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_environment_overrides_every_kind_of_scalar(write: Any) -> None:
    """Numbers, texts, truth values and keys; names in capitals, `-` and `.` as `_`."""
    text = SMALL.replace("main", "open-ai.main").replace("[deployments.open-ai.main]", '[deployments."open-ai.main"]')
    text += '[tenants.t]\napi_key = "old"\n'
    settings = load(
        write(text),
        {
            "EMBEDGATE_SERVER__PORT": "9000",
            "EMBEDGATE_SERVER__DEADLINE_S": "2.5",
            "EMBEDGATE_DEPLOYMENTS__OPEN_AI_MAIN__MODEL": "123",
            "EMBEDGATE_DEPLOYMENTS__OPEN_AI_MAIN__TAKES_TOKEN_IDS": "true",
            "EMBEDGATE_DEPLOYMENTS__OPEN_AI_MAIN__JUDGED_SPANS_S": "[1, 10]",
            "EMBEDGATE_DEPLOYMENTS__OPEN_AI_MAIN__API_KEY": "env:THE_KEY",
            "EMBEDGATE_MODELS__BGE__DIMENSIONS": "512",
            "EMBEDGATE_TENANTS__T__API_KEY": "12345",
            "THE_KEY": "key-of-the-provider",
        },
    )
    deployment = settings.deployments["open-ai.main"]
    assert isinstance(deployment, RemoteDeployment)
    assert (settings.server.port, settings.server.deadline_s) == (9000, 2.5)
    assert (deployment.model, deployment.takes_token_ids, deployment.judged_spans_s) == ("123", True, (1.0, 10.0))
    assert deployment.api_key is not None
    assert deployment.api_key.get_secret_value() == "key-of-the-provider"
    assert settings.models["bge"].dimensions == 512
    assert settings.tenants["t"].api_key[0].get_secret_value() == "12345"


def test_options_win_over_the_environment_and_the_environment_over_the_file(write: Any) -> None:
    """The nearest word counts; variables of other kinds are left alone."""
    path = write("[server]\nport = 1\n")
    environ = {"EMBEDGATE_SERVER__PORT": "2", "EMBEDGATE_PORT_8080_TCP": "x", "EMBEDGATE_CONFIG": "y"}
    assert load(path, environ).server.port == 2
    assert load(path, environ, options={"port": 3}).server.port == 3


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_come_from_the_environment_a_file_or_the_text_itself(write: Any, tmp_path: Path) -> None:
    """The end of a file's last line is no part of the key."""
    (tmp_path / "key").write_text("from-file\n", "utf-8")
    path = write(f'[tenants.t]\napi_key = ["env:K", "file:{tmp_path}/key", "literal"]\n')
    keys = load(path, {"K": "from-env"}).tenants["t"].api_key
    assert [key.get_secret_value() for key in keys] == ["from-env", "from-file", "literal"]


KEYS = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=12, max_size=40).map(lambda s: f"sk-{s}")


@given(key=KEYS, bad=st.sampled_from(["", "port = -1", "nonsense = 1", 'host = "0.0.0.1"']))
def test_no_key_ever_shows(tmp_path_factory: pytest.TempPathFactory, key: str, bad: str) -> None:
    """Not in repr, description or refusals, wherever it was written."""
    path = tmp_path_factory.getbasetemp() / "keys.toml"
    path.write_text(
        f'[server]\nadmin_key = "{key}a"\n{bad}\n[deployments.d]\ndialect = "openai"\napi_key = "{key}"\n'
        f'model = "text-embedding-3-small"\n[models.m]\ndeployments = ["d"]\n[tenants.t]\napi_key = ["{key}b"]\n',
        "utf-8",
    )
    environ = {"EMBEDGATE_TENANTS__T__API_KEY": f"{key} {key}" if bad else f"{key}c"}
    try:
        settings = load(path, environ)
        shown = f"{settings!r}{settings}{describe(settings)}{settings.model_dump()}"
    except ConfigurationError as error:
        shown = f"{error}{error!r}"
    assert key not in shown


DESCRIBED = [
    SMALL + 'cuts_dimensions = true\n[tenants.t]\napi_key = "k"\nweight = 2.5\n',
    SMALL.replace("[models", "max_batch_tokens = 500\nheadroom = 0.9\nrequests_per_minute = 60\n[models")
    + 'query_prompt = "query: "\ninput_type = "query"\nspill = 2.5\ncanary_cosine = 0.99\n',
    OPENAI.format('tier = "1"\nheadroom = 0.9', ""),
    '[deployments.d]\ndialect = "voyage"\napi_key = "k"\nmodel = "voyage-4"\n[models.m]\ndeployments = ["d"]\n',
    "",
]


@pytest.mark.parametrize("text", DESCRIBED, ids=["unknown", "stated", "tier", "vendor", "nothing"])
def test_the_description_says_what_is_in_force_and_loads_again(write: Any, text: str) -> None:
    """What `check` prints is a configuration that serves the same, but for the keys."""
    settings = load(write(text), {})
    again = load(write(describe(settings)), {})
    for name, deployment in settings.deployments.items():
        same = again.deployments[name]
        assert (same.limits(), same.retry(), same.breaker(alone=True)) == (
            deployment.limits(),
            deployment.retry(),
            deployment.breaker(alone=True),
        )
        if isinstance(deployment, RemoteDeployment):
            assert isinstance(same, RemoteDeployment)
            assert same.understands_token_ids == deployment.understands_token_ids
    assert [again.facts(name) for name in again.models] == [settings.facts(name) for name in settings.models]
    assert [noun.tenant(name) for name, noun in again.tenants.items()] == [
        noun.tenant(name) for name, noun in settings.tenants.items()
    ]
    in_force = [line for line in describe(settings).splitlines() if not line.startswith("# headroom")]
    assert describe(again).splitlines() == in_force


def test_the_description_shows_tier_headroom_and_catalog(write: Any) -> None:
    """The limits that count, where they come from, and the price."""
    shown = describe(load(write(DESCRIBED[2]), {}))
    for said in (
        "requests_per_minute = 2700",
        "tokens_per_minute = 900000",
        "# headroom: 0.9, which is taken off the quotas below",
        "# price: 0.02 USD per million tokens, 0.01 in the vendor's batches (catalog of 20",
        "dimensions = 1536",
        "takes_token_ids = true",
    ):
        assert said in shown.replace('"', ""), shown
    wider = describe(load(write(DESCRIBED[3]), {}))
    assert "# vectors are 1024 wide; callers may ask for up to 2048" in wider


def test_settings_cannot_be_changed(write: Any) -> None:
    """What was validated at boot stays as it was."""
    settings = load(write(SMALL), {})
    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1
    assert isinstance(settings, Settings)


def test_an_unknown_model_of_a_vendor_with_own_words_tells_input_types_apart(write: Any) -> None:
    """A query is never taken for a document only because a model is newer than the catalog."""
    text = '[deployments.d]\ndialect = "cohere"\napi_key = "k"\nmodel = "embed-v9"\n'
    settings = load(write(text + '[models.m]\ndeployments = ["d"]\ndimensions = 8\n'), {})
    assert dict(settings.facts("m").prompts) == {"query": "", "document": ""}


def test_a_key_in_the_place_of_its_name_is_not_shown(write: Any) -> None:
    """Whoever writes `env:` before the key itself does not find it in the error."""
    for key in ("sk-proj-abc123", "pa-Xyz", "AIzaSyD-9tSr"):
        with pytest.raises(ConfigurationError) as refused:
            load(write(SMALL.replace('model = "bge-small"', f'model = "bge-small"\napi_key = "env:{key}"')), {})
        assert "api_key: the environment variable that it names is not set" in str(refused.value)
        assert key not in str(refused.value)


def test_lists_can_be_overridden_by_the_environment(write: Any) -> None:
    """As JSON, which TOML's lists of texts are; a list nested too deeply is a text like any other."""
    path = write(SMALL + '[tenants.t]\napi_key = "k"\n')
    settings = load(
        path,
        {
            "EMBEDGATE_MODELS__BGE__DEPLOYMENTS": '["main"]',
            "EMBEDGATE_TENANTS__T__MODELS": '["bge"]',
            "EMBEDGATE_TENANTS__T__API_KEY": '["one", "two"]',
        },
    )
    assert settings.models["bge"].deployments == ("main",)
    assert settings.tenants["t"].models == ("bge",)
    assert [key.get_secret_value() for key in settings.tenants["t"].api_key] == ["one", "two"]
    with pytest.raises(ConfigurationError, match="must be a list"):
        load(path, {"EMBEDGATE_MODELS__BGE__DEPLOYMENTS": "[" * 20_000})


@pytest.mark.parametrize("path", ["~no-such-user/x", "a\\u0000b"])
@pytest.mark.parametrize("section", ['[server]\nlog_file = "{}"\n', '[stores]\ndata_dir = "{}"\n', LOCAL_PATH])
def test_a_path_that_is_none_is_refused(write: Any, section: str, path: str) -> None:
    """A home that there is not, or a NUL, is told with its line instead of a traceback."""
    with pytest.raises(ConfigurationError, match=r"embedgate\.toml:\d+: "):
        load(write(section.format(path) + ("" if section is LOCAL_PATH else SMALL)), {})
