"""Configurations that are refused: where to look, and which words say how to mend them."""

from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigurationError
from app.settings import load

SMALL = """\
[deployments.main]
dialect = "openai"
base_url = "http://10.0.0.7:8000/v1"
model = "bge-small"

[models.bge]
deployments = ["main"]
dimensions = 384
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Puts a text into `embedgate.toml` and returns its path."""

    def put(text: str) -> Path:
        path = tmp_path / "embedgate.toml"
        path.write_text(text, "utf-8")
        return path

    return put


def refusal(path: Path | None, environ: dict[str, str] | None = None, **options: object) -> list[str]:
    """The lines with which a configuration is refused, the file's folder cut off."""
    with pytest.raises(ConfigurationError) as refused:
        load(path, environ or {}, options=options)
    return str(refused.value).replace(f"{path.parent}/" if path else "\0", "").splitlines()


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────

WRONG_VALUES = [
    ('[server]\nhost = "127.0.0.1"\nprot = 8080', "3", "server.prot: unknown key; did you mean 'port'?"),
    ("[sever]\nport = 1", "1", "sever: unknown section; did you mean 'server'?"),
    ("[server]\n\nport = 99999", "3", "server.port: must be at most 65535, not 99999"),
    ('[server]\nport = "8080"', "2", "server.port: must be a whole number"),
    ("[server]\nport = true", "2", "server.port: must be a whole number"),
    ("[server]\ndeadline_s = 0", "2", "server.deadline_s: must be more than 0, not 0"),
    ("[server]\ndeadline_s = nan", "2", "server.deadline_s: must be a finite number"),
    ("[server]\nlog_sample = 1.5", "2", "server.log_sample: must be at most 1, not 1.5"),
    ('[server]\nhost = "http://x"', "2", "server.host: must be an address or a host name, without scheme and port"),
    ("server = 3", "1", "server: must be a table"),
    ("[queue]\nbulk_share = 0.01", "2", "queue.bulk_share: must be at least 0.05, not 0.01"),
    ("[cache]\nmemory_bytes = -1", "2", "cache.memory_bytes: must be at least 0, not -1"),
    ("deployments = 3", "1", "deployments: must be a table"),
    ("[deployments.x]\nport = 1", "1", "deployments.x.dialect: is required"),
    (
        '[deployments.x]\n# a comment\ndialect = "opnai"',
        "3",
        "deployments.x.dialect: unknown dialect 'opnai'; did you mean 'openai'?",
    ),
    (
        '[deployments.x]\ndialect = "zzz"',
        "2",
        "deployments.x.dialect: unknown dialect 'zzz'; it may be openai, local",
    ),
    (
        '[deployments.x]\ndialect = "azure"',
        "2",
        "deployments.x.dialect: 'azure' is not supported by this version yet",
    ),
    (
        '[deployments.x]\ndialect = "local"\nbase_url = "http://x"',
        "3",
        "deployments.x.base_url: belongs to deployments of another dialect",
    ),
    (
        '[deployments.x]\ndialect = "local"\npooling = "meen"',
        "3",
        "deployments.x.pooling: unknown pooling 'meen'; did you mean 'mean'?",
    ),
    (
        '[deployments.x]\ndialect = "local"\njudged_spans_s = []',
        "3",
        "deployments.x.judged_spans_s: must not be empty",
    ),
    (
        '[deployments."a b"]\ndialect = "local"',
        "1",
        'deployments."a b": must be 1 to 128 printable ASCII characters without spaces',
    ),
    (
        '[deployments.x]\ndialect = "openai"\nbase_url = "ftp://x/v1"\nmodel = "m"',
        "3",
        "deployments.x.base_url: must be a URL such as https://api.openai.com/v1",
    ),
    (
        '[deployments.x]\ndialect = "openai"\nbase_url = "http://x/v1/embeddings"\nmodel = "m"',
        "3",
        "deployments.x.base_url: must end before /embeddings, which is added to it",
    ),
    ('[models.m]\ndeployments = "local"', "2", "models.m.deployments: must be a list in square brackets"),
    ('[models.m]\ndeployments = ["a", "a"]', "2", "models.m.deployments: names something twice"),
    ("[models.m]\ndimensions = 3", "1", "models.m.deployments: is required"),
    (
        '[models.m]\ndeployments = ["a"]\nlong_input = "mean"',
        "3",
        "models.m.long_input: 'mean' is not supported by this version yet",
    ),
    (
        '[models."a.b"]\ndeployments = ["a"]\ndimensions = 0',
        "3",
        'models."a.b".dimensions: must be at least 1, not 0',
    ),
    ("[tenants.t]\nweight = 1", "1", "tenants.t.api_key: is required"),
    ("[tenants.t]\napi_key = []", "2", "tenants.t.api_key: must not be empty"),
    ("[tenants.t]\napi_key = 7", "2", "tenants.t.api_key: must be a list in square brackets"),
    (
        '[tenants.t]\napi_key = "env:NO_SUCH"',
        "2",
        "tenants.t.api_key: the environment variable NO_SUCH is not set",
    ),
    (
        '[tenants.t]\napi_key = "file:/no/such/file"',
        "2",
        "tenants.t.api_key: the file /no/such/file cannot be read",
    ),
    (
        '[tenants.t]\napi_key = "two words"',
        "2",
        "tenants.t.api_key: the key is empty or has characters that an HTTP header cannot carry",
    ),
    ('[tenants.t]\napi_key = "k"\nbudget_usd_per_day = 5', "3", "tenants.t.budget_usd_per_day: is not supported"),
    ('[stores]\nredis_url = "redis://x"', "2", "stores.redis_url: is not supported by this version yet"),
    ("[stores]\nnonsense = 1", "1", "stores: is not supported by this version yet"),
    ("[bulk]\nx = 1", "1", "bulk: is not supported by this version yet"),
    ("[server]\nworkers = 4", "2", "server.workers: is not supported by this version yet"),
    ('[server]\nsecret = "env:X"', "2", "server.secret: is not supported by this version yet"),
    ("[cache]\nfloat16 = true", "2", "cache.float16: is not supported by this version yet"),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG_VALUES, ids=[row[2][:40] for row in WRONG_VALUES])
def test_a_wrong_value_is_told_with_file_line_key_and_mend(write: Any, text: str, line: str, message: str) -> None:
    """Every class of mistake names its line and says how to mend it."""
    told = refusal(write(text))
    assert any(one.startswith(f"embedgate.toml:{line}: {message}") for one in told), told


SECOND = '[deployments.other]\ndialect = "openai"\nbase_url = "http://10.0.0.8/v1"\nmodel = "bge-small"\n'
LOCAL = '[deployments.local]\ndialect = "local"\n'

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
    (LOCAL + '[models.text-embedding-3-small]\ndeployments = ["local"]', 3, "is the name of an OpenAI model"),
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
    ('[server]\nhost = "0.0.0.0"', 2, "'0.0.0.0' can be reached from other machines, so callers need keys"),
    (
        '[tenants.a]\napi_key = "k"\n[tenants.b]\napi_key = ["j", "k"]',
        4,
        "is also the key of tenants.a; every key names one owner",
    ),
    ('[server]\nadmin_key = "k"\n[tenants.a]\napi_key = "k"', 4, "is also the key of server.admin_key"),
    ('[tenants.a]\napi_key = "k"\nmodels = ["all-MiniLM"]', 3, "there is no model 'all-MiniLM'; did you mean"),
    (LOCAL + 'backoff_cap_s = 0.1\n[models.m]\ndeployments = ["local"]', 3, "must be at least backoff_base_s"),
    (LOCAL + 'breaker_open_cap_s = 0.1\n[models.m]\ndeployments = ["local"]', 3, "must be at least breaker_open_s"),
    (LOCAL + 'pooling = "cls"\n[models.m]\ndeployments = ["local"]', 3, "needs a path"),
    (
        '[deployments.d]\ndialect = "openai"\nmodel = "m"\n[models.m]\ndeployments = ["d"]\ndimensions = 3',
        1,
        'deployments.d.api_key: is required by api.openai.com, for example "env:OPENAI_API_KEY"',
    ),
]


@pytest.mark.parametrize(("text", "line", "message"), CONTRADICTIONS, ids=[row[2][:40] for row in CONTRADICTIONS])
def test_values_that_contradict_each_other_are_refused(write: Any, text: str, line: int, message: str) -> None:
    """Each value is fine by itself, all of them together cannot be served."""
    (told,) = refusal(write(text))
    assert told.startswith(f"embedgate.toml:{line}: ")
    assert message in told


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(write: Any) -> None:
    """One run of `check` is enough to mend everything."""
    text = "[server]\nport = -1\nprot = 2\nworkers = 2\n[queue]\nmax_items = 0\n"
    assert [line.split(": ")[:2] for line in refusal(write(text))] == [
        ["embedgate.toml:2", "server.port"],
        ["embedgate.toml:3", "server.prot"],
        ["embedgate.toml:4", "server.workers"],
        ["embedgate.toml:6", "queue.max_items"],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nport =\n", "embedgate.toml:2: is not TOML: Invalid value"),
        ("[server]\nport = 1\nport = 2\n", "embedgate.toml:3: is not TOML: "),
        ('[server]\nhost = """x', "embedgate.toml:2: is not TOML: "),
        ("[cache]\nmemory_bytes = " + "9" * 5000, "embedgate.toml:2: is not TOML: a value is too large"),
        ("x = " + "[" * 5000, "embedgate.toml:1: is not TOML: "),
    ],
)
def test_what_is_no_toml_is_told_with_its_line(write: Any, text: str, message: str) -> None:
    """The parser's own position is kept."""
    (told,) = refusal(write(text))
    assert told.startswith(message)


def test_a_file_that_cannot_be_read_is_told_by_name(tmp_path: Path) -> None:
    """Missing, a folder, or not text: one line each."""
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    assert refusal(tmp_path / "none.toml") == ["none.toml: cannot be read: No such file or directory"]
    assert refusal(tmp_path / "latin.toml") == ["latin.toml: is not UTF-8"]
    (told,) = refusal(tmp_path)
    assert told.endswith("cannot be read: Is a directory")


def test_the_operators_word_makes_two_names_one_space(write: Any) -> None:
    """`same_space = true` lets deployments serve one model under different names, never local beside openai."""
    two = SECOND.replace("bge-small", "bge-small-v1") + SMALL.replace('["main"]', '["main", "other"]')
    assert load(write(two + "same_space = true"), {}).models["bge"].deployments == ("main", "other")
    mixed = LOCAL + SMALL.replace('["main"]', '["main", "local"]') + "same_space = true"
    assert "comparable" in refusal(write(mixed))[0]


def test_a_wrong_override_is_told_by_its_own_name(write: Any) -> None:
    """The message names the variable or the option, not a line of the file."""
    path = write(SMALL)
    assert refusal(path, {"EMBEDGATE_SERVER__PORT": "many"}) == [
        "EMBEDGATE_SERVER__PORT: server.port: must be a whole number"
    ]
    assert refusal(path, {"EMBEDGATE_SEVER__PORT": "1"}) == [
        "EMBEDGATE_SEVER__PORT: names nothing in the configuration; did you mean 'EMBEDGATE_SERVER__PORT'?"
    ]
    assert refusal(path, {"EMBEDGATE_STORES__REDIS_URL": "redis://x"}) == [
        "EMBEDGATE_STORES__REDIS_URL: stores.redis_url: is not supported by this version yet"
    ]
    assert refusal(path, host="0.0.0.0")[0].startswith("--host: server.host: '0.0.0.0' can be reached")


def test_the_environment_cannot_add_what_the_file_does_not_name(write: Any) -> None:
    """A deployment that exists only in the environment is a mistake, and so is one name for two deployments."""
    assert "names nothing" in refusal(write(SMALL), {"EMBEDGATE_DEPLOYMENTS__NEW__DIALECT": "local"})[0]
    twins = SECOND.replace("other", "a-b") + SECOND.replace("other", "a_b") + SMALL
    assert "more than one thing" in refusal(write(twins), {"EMBEDGATE_DEPLOYMENTS__A_B__MODEL": "m"})[0]


def test_a_key_in_the_wrong_place_does_not_show(write: Any) -> None:
    """Credentials in a URL and a misspelt api_key are refused without being repeated."""
    text = SMALL.replace("http://", "http://me:hunter2@") + '[tenants.t]\napi_kee = "hunter2"\napi_key = "hunter2 "\n'
    told = "\n".join(refusal(write(text)))
    assert "did you mean 'api_key'?" in told
    assert "must hold no credentials" in told
    assert "hunter2" not in told
