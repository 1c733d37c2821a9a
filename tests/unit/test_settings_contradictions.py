"""Configurations whose values are each fine, and cannot be served together."""

from pathlib import Path
from typing import Any

import pytest

from app.domain import Limits
from app.settings import describe, load
from tests.unit.configurations import SMALL, refusal

SECOND = '[deployments.other]\ndialect = "openai"\nbase_url = "http://10.0.0.8/v1"\nmodel = "bge-small"\n'
LOCAL = '[deployments.local]\ndialect = "local"\n'


def single(dialect: str, upstream: str, deployment: str = "", model: str = "") -> str:
    """One deployment `x` (lines 1 to 4 and one of its own), one model `m` (lines 5 and 6, then its own)."""
    head = f'[deployments.x]\ndialect = "{dialect}"\nmodel = "{upstream}"\n{deployment}\n'
    return f'{head}[models.m]\ndeployments = ["x"]\n{model}\n'


CONTRADICTIONS = [
    (SMALL.replace('["main"]', '["mian"]'), 7, "there is no deployment 'mian'; did you mean 'main'?"),
    (
        LOCAL + SMALL.replace('["main"]', '["main", "local"]'),
        9,
        "'main' (openai, bge-small) and 'local' (local, all-MiniLM-L6-v2) do not make comparable vectors",
    ),
    (
        SECOND.replace("bge-small", "bge-large") + SMALL.replace('["main"]', '["main", "other"]'),
        11,
        "'main' (openai, bge-small) and 'other' (openai, bge-large) serve different models",
    ),
    (LOCAL + '[models.voyage-4]\ndeployments = ["local"]', 3, "is the name of a vendor's model, which a local"),
    (SMALL.replace("dimensions = 384", ""), 6, "dimensions is required, since 'bge-small' is not in the catalog"),
    (SMALL.replace("bge-small", "text-embedding-3-small") + "max_input_tokens = 9000", 9, "takes at most 8192"),
    (
        SMALL.replace("bge-small", "text-embedding-3-small").replace("384", "2000"),
        8,
        "'text-embedding-3-small' has at most 1536, not 2000",
    ),
    (SMALL.replace("bge-small", "text-embedding-ada-002"), 8, "'text-embedding-ada-002' has exactly 1536, not 384"),
    (
        SMALL.replace("bge-small", "text-embedding-ada-002").replace("dimensions = 384", "cuts_dimensions = true"),
        8,
        "vectors of 'text-embedding-ada-002' cannot be cut",
    ),
    (LOCAL + '[models.m]\ndeployments = ["local"]\ntokenizer = "estimate"', 5, "must be left off"),
    (LOCAL + '[models.m]\ndeployments = ["local"]\ndimensions = 384', 5, "must be left off"),
    ("[server]\nport = 8081\nadmin_port = 8081", 3, "admin_port: is server.port already; name another one, or 0"),
    ("[server]\nadmin_port = 8080", 2, "admin_port: is server.port already"),
    ('[server]\nhost = "0.0.0.0"', 2, "'0.0.0.0' can be reached from other machines, so callers need keys"),
    (
        '[tenants.a]\napi_key = "k"\n[tenants.b]\napi_key = ["j", "k"]',
        4,
        "is also the key of tenants.a; every key names one owner",
    ),
    ('[server]\nadmin_key = "k"\n[tenants.a]\napi_key = "k"', 4, "is also the key of server.admin_key"),
    ('[tenants.a]\napi_key = "k"\nmodels = ["all-MiniLM"]', 3, "there is no model 'all-MiniLM'; did you mean"),
    (LOCAL + '[models.m]\ndeployments = ["local"]\nquery_prompt = "q: "', 5, "must be left off"),
    (LOCAL + 'cooldown_cap_s = 0.1\n[models.m]\ndeployments = ["local"]', 3, "must be at least cooldown_s"),
    (LOCAL + 'cooldown_s = 5\n[models.m]\ndeployments = ["local"]', 1, "cooldown_cap_s: must be at least cooldown_s"),
    (
        LOCAL + 'min_batch_tokens = 9000\n[models.m]\ndeployments = ["local"]',
        3,
        "must be at most max_batch_tokens, which is 8192",
    ),
    (
        LOCAL + 'tier = "1"\n[models.m]\ndeployments = ["local"]',
        3,
        "tier: none is known for 'all-MiniLM-L6-v2': state requests_per_minute and tokens_per_minute instead",
    ),
    (SMALL.replace("[models", 'tier = "1"\n[models'), 6, "tier: none is known for 'bge-small': state"),
    (
        SMALL.replace("bge-small", "text-embedding-3-small").replace("[models", 'tier = "fre"\n[models'),
        6,
        "unknown tier 'fre'; did you mean 'free'?",
    ),
    (
        SMALL.replace("bge-small", "text-embedding-3-small").replace("[models", 'tier = "9"\n[models'),
        6,
        "unknown tier '9'; it may be free, 1, 2, 3, 4, 5",
    ),
    (SMALL.replace("[models", 'auth = "bearer"\n[models'), 6, "belongs to deployments of the dialect 'azure'"),
    (
        SMALL.replace('"openai"', '"voyage"').replace("[models", 'server = "tei"\n[models'),
        6,
        "belongs to deployments of the dialect 'openai'",
    ),
    (single("openai", "m", 'server = "tei"', "dimensions = 3"), 1, "base_url: is required by the server 'tei'"),
    (
        single("azure", "text-embedding-3-small", 'api_key = "k"'),
        1,
        "base_url: is required by the dialect 'azure'",
    ),
    (
        single("azure", "text-embedding-3-small", 'base_url = "https://x.example/openai/v1"'),
        1,
        'api_key: is required by x.example, for example "env:AZURE_API_KEY"',
    ),
    (
        SMALL + 'tokenizer = "cl100k"',
        9,
        "tokenizer: there is no file 'cl100k' that can be read; did you mean 'cl100k_base'?",
    ),
    (
        SMALL + 'tokenizer = "/nowhere/at all.json"',
        9,
        'there is no file \'/nowhere/at all.json\' that can be read; it may be "cl100k_base", "estimate" or the path',
    ),
    (SMALL + 'tokenizer = "."', 9, "there is no file '.' that can be read"),
    (SMALL + 'tokenizer = "\\u0007"', 9, "there is no file '' that can be read"),
    (SMALL + 'long_input = "mean"', 9, "'mean' cuts windows in the model's own vocabulary: set tokenizer"),
    (
        SMALL.replace('"openai"', '"mistral"') + 'long_input = "truncate"',
        9,
        "'bge-small' is not cut by its vendor, and here only exactly: set tokenizer",
    ),
    (
        SMALL + 'long_input = "mean"\ntokenizer = "cl100k_base"\nmax_input_tokens = 512\noverlap_tokens = 256',
        12,
        "overlap_tokens: must be less than half of max_input_tokens, which is 512",
    ),
    (SMALL + 'input_type = "query"', 9, "'bge-small' tells no input types apart; set query_prompt"),
    (
        single("voyage", "voyage-4", 'api_key = "k"', 'query_prompt = "q: "'),
        7,
        "query_prompt: must be left off: 'voyage-4' has words of its own for it",
    ),
    (
        single("voyage", "voyage-4", 'api_key = "k"', "dimensions = 100"),
        7,
        "'voyage-4' has one of 256, 512, 1024, 2048, not 100",
    ),
    (SMALL + 'on_outage = "bgee"', 9, "on_outage: there is no model 'bgee'; did you mean 'bge'?"),
    (SMALL + 'on_outage = "bge"', 9, "on_outage: names the model itself"),
    (
        LOCAL
        + SMALL
        + 'on_outage = "mini"\n[models.mini]\ndeployments = ["local"]\non_outage = "tiny"\n'
        + '[models.tiny]\ndeployments = ["local"]',
        11,
        "on_outage: 'mini' has an on_outage of its own, and only one step is ever taken",
    ),
    (LOCAL + 'backoff_cap_s = 0.1\n[models.m]\ndeployments = ["local"]', 3, "must be at least backoff_base_s"),
    (
        (
            '[deployments.d]\ndialect = "voyage"\napi_key = "k"\nmodel = "voyage-9"\n'
            '[models.m]\ndeployments = ["d"]\ndimensions = 8\nquery_prompt = "q: "'
        ),
        8,
        "the dialect 'voyage' has its own words",
    ),
    (LOCAL + 'breaker_open_cap_s = 0.1\n[models.m]\ndeployments = ["local"]', 3, "must be at least breaker_open_s"),
    (LOCAL + 'pooling = "cls"\n[models.m]\ndeployments = ["local"]', 3, "needs a path"),
    (
        single("openai", "m", model="dimensions = 3"),
        1,
        'deployments.x.api_key: is required by api.openai.com, for example "env:OPENAI_API_KEY"',
    ),
]


@pytest.mark.parametrize(("text", "line", "message"), CONTRADICTIONS, ids=[row[2][:40] for row in CONTRADICTIONS])
def test_values_that_contradict_each_other_are_refused(write: Any, text: str, line: int, message: str) -> None:
    """Each value is fine by itself, all of them together cannot be served."""
    (told,) = refusal(write(text))
    assert told.startswith(f"embedgate.toml:{line}: ")
    assert message in told


def test_the_operators_word_makes_two_names_one_space(write: Any) -> None:
    """`same_space = true` lets deployments serve one model under different names or dialects, never local ones too."""
    two = SECOND.replace("bge-small", "bge-small-v1") + SMALL.replace('["main"]', '["main", "other"]')
    assert load(write(two + "same_space = true"), {}).models["bge"].deployments == ("main", "other")
    foreign = SECOND.replace('"openai"', '"mistral"') + SMALL.replace('["main"]', '["main", "other"]')
    assert "'main' (openai, bge-small) and 'other' (mistral, bge-small) serve different" in refusal(write(foreign))[0]
    assert load(write(foreign + "same_space = true"), {}).models["bge"].deployments == ("main", "other")
    mixed = LOCAL + SMALL.replace('["main"]', '["main", "local"]') + "same_space = true"
    assert "do not make comparable vectors" in refusal(write(mixed))[0]


def test_one_model_at_its_vendor_and_at_who_resells_it_is_one_space(write: Any) -> None:
    """OpenAI and Azure run the same model, which needs no word of the operator; another model of theirs is refused."""
    text = (
        '[deployments.a]\ndialect = "openai"\napi_key = "k"\nmodel = "text-embedding-3-small"\n[deployments.b]\n'
        'dialect = "azure"\nbase_url = "https://x.example/openai/v1"\napi_key = "k"\nserved_as = "mine"\n'
        'model = "text-embedding-3-small"\n[models.m]\ndeployments = ["a", "b"]\n'
    )
    assert load(write(text), {}).models["m"].deployments == ("a", "b")
    (told,) = refusal(write(text.replace('"text-embedding-3-small"', '"text-embedding-ada-002"', 1)))
    assert "'a' (openai, text-embedding-ada-002) and 'b' (azure, text-embedding-3-small)" in told


def test_same_space_does_not_ask_of_a_known_model_what_it_has_not(write: Any) -> None:
    """Every deployment must make vectors of the width that is served, not only the first one."""
    two = SECOND.replace("bge-small", "text-embedding-ada-002") + SMALL.replace('["main"]', '["main", "other"]')
    (told,) = refusal(write(two + "same_space = true"))
    assert told.endswith("models.bge.dimensions: 'text-embedding-ada-002' has exactly 1536, not 384")


def test_a_server_that_cuts_silently_needs_the_models_tokenizer(write: Any, tmp_path: Path) -> None:
    """Nobody could tell that a text was too long; with it the text is refused before, unless a cut is wanted."""
    silent = SMALL.replace("[models", 'server = "infinity"\n[models')
    (told,) = refusal(write(silent))
    assert "models.bge.tokenizer: 'infinity' cuts long texts without a word" in told
    (tmp_path / "tokenizer.json").touch()
    exact = silent + f'tokenizer = "{tmp_path}/tokenizer.json"\n'
    (told,) = refusal(write(exact))
    assert "models.bge.max_input_tokens: is required, since 'infinity' cuts longer texts" in told
    load(write(exact + "max_input_tokens = 512\n"), {})
    load(write(silent + 'long_input = "truncate"\n'), {})


SECRET = "0123456789abcdef0123456789abcdef"


def test_what_processes_share_needs_a_secret_that_nobody_can_guess(write: Any) -> None:
    """Each shared store asks for it; a short one is refused; an older one may stand beside it."""
    for store in ('redis_url = "redis://127.0.0.1"', 'database_url = "postgresql://127.0.0.1/e"'):
        path = write(SMALL + f"[stores]\n{store}\n")
        (told,) = refusal(path)
        assert f"server.secret: is required by stores.{store.split(' ')[0]}" in told
        load(path, {"EMBEDGATE_SERVER__SECRET": SECRET})
        settings = load(path, {"EMBEDGATE_SERVER__SECRET": f'["{SECRET}", "{SECRET[::-1]}"]'})
        assert len(settings.server.secret) == 2
    (told,) = refusal(write('[server]\nsecret = "short"\n' + SMALL))
    assert "server.secret: needs at least 16 characters that nobody can guess" in told


def test_the_password_in_a_stores_url_is_never_shown(write: Any) -> None:
    """Neither by what is in force nor by a refusal."""
    url = "postgresql://me:hunter2hunter2@127.0.0.1/e"
    path = write(f'[server]\nsecret = "{SECRET}"\n[stores]\ndatabase_url = "{url}"\n' + SMALL)
    assert "hunter2" not in describe(load(path, {}))
    (told,) = refusal(write(f'[stores]\nredis_url = "{url}"\n[server]\nsecret = "{SECRET}"\n' + SMALL))
    assert "hunter2" not in told


def test_a_tenant_without_limits_has_none(write: Any) -> None:
    """Each limit by itself is one; all of them are in the noun."""
    path = write(
        SMALL + '[tenants.a]\napi_key = "k"\n[tenants.b]\napi_key = "l"\ntokens_per_minute = 5\ncache_group = "g"\n'
        'bulk_tier = "vendor_batch"\n'
    )
    tenants = {name: each.tenant(name) for name, each in load(path, {}).tenants.items()}
    assert tenants["a"].limits is None
    assert tenants["b"].limits == Limits(0, 5, 0)
    assert (tenants["a"].cache_group, tenants["b"].cache_group) == ("", "g")
    assert (tenants["a"].bulk_tier, tenants["b"].bulk_tier) == ("online", "vendor_batch")
