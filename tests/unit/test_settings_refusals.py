"""Configurations that are refused for a single value: where to look, and which words say how to mend it."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.configurations import SMALL, refusal

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
        "deployments.x.dialect: unknown dialect 'zzz'; it may be openai, azure, gemini, voyage, cohere, mistral, ",
    ),
    ("deployments.x = 3", "1", "deployments.x: must be a table"),
    (
        '[deployments.x]\ndialect = "openai"\nserver = "olama"',
        "3",
        "deployments.x.server: unknown server 'olama'; did you mean 'ollama'?",
    ),
    (
        '[deployments.x]\ndialect = "azure"\nauth = "barer"',
        "3",
        "deployments.x.auth: unknown auth 'barer'; did you mean 'bearer'?",
    ),
    (
        '[deployments.x]\ndialect = "azure"\napi_version = "2024/10"',
        "3",
        'deployments.x.api_version: must be a version such as "2024-10-21"',
    ),
    (
        '[deployments.x]\ndialect = "azure"\npath = "models"',
        "3",
        "deployments.x.path: belongs to deployments of another dialect",
    ),
    (
        '[deployments.x]\ndialect = "local"\nserved_as = "m"',
        "3",
        "deployments.x.served_as: belongs to deployments of another dialect",
    ),
    (
        '[deployments.x]\ndialect = "local"\njitter = "some"',
        "3",
        'deployments.x.jitter: must be "full" or a share from 0 to 1',
    ),
    (
        '[deployments.x]\ndialect = "local"\njitter = 1.5',
        "3",
        'deployments.x.jitter: must be "full" or a share from 0 to 1',
    ),
    (
        '[deployments.x]\ndialect = "local"\nheadroom = 0',
        "3",
        "deployments.x.headroom: must be more than 0, not 0",
    ),
    (
        '[deployments.x]\ndialect = "local"\ncooldown_cap_s = 301',
        "3",
        "deployments.x.cooldown_cap_s: must be at most 300, not 301",
    ),
    (
        '[deployments.x]\ndialect = "local"\ntier = "a b"',
        "3",
        "deployments.x.tier: must be 1 to 128 printable ASCII characters without spaces",
    ),
    (
        '[deployments.x]\ndialect = "local"\ntarget_latency_ms = -1',
        "3",
        "deployments.x.target_latency_ms: must be at least 0, not -1",
    ),
    (
        '[models.m]\ndeployments = ["a"]\nspill = "later"',
        "3",
        'models.m.spill: must be "wait", "now" or milliseconds from 0 to 3600000',
    ),
    (
        '[models.m]\ndeployments = ["a"]\nspill = -1',
        "3",
        'models.m.spill: must be "wait", "now" or milliseconds from 0 to 3600000',
    ),
    (
        '[models.m]\ndeployments = ["a"]\norder = "spreaded"',
        "3",
        "models.m.order: unknown order 'spreaded'; did you mean 'spread'?",
    ),
    (
        '[models.m]\ndeployments = ["a"]\ninput_type = "passage"',
        "3",
        "models.m.input_type: unknown input_type 'passage'; it may be query, document",
    ),
    (
        '[models.m]\ndeployments = ["a"]\ncanary_cosine = 1.1',
        "3",
        "models.m.canary_cosine: must be at most 1, not 1.1",
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
        '[models.m]\ndeployments = ["a"]\nlong_input = "means"',
        "3",
        "models.m.long_input: unknown long_input 'means'; did you mean 'mean'?",
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
    (
        '[tenants.t]\napi_key = "k"\nbudget_usd_per_day = 0.0000000005',
        "3",
        "tenants.t.budget_usd_per_day: must be dollars from 0 to 9000000 with at most 9 decimals",
    ),
    (
        '[tenants.t]\napi_key = "k"\nbudget_usd_per_month = 9000000.01',
        "3",
        "tenants.t.budget_usd_per_month: must be at most 9e+06",
    ),
    ('[tenants.t]\napi_key = "k"\nbudget_usd_per_day = -1', "3", "tenants.t.budget_usd_per_day: must be at least 0"),
    (
        '[tenants.t]\napi_key = "k"\nbulk_tier = "batch"',
        "3",
        "tenants.t.bulk_tier: unknown bulk_tier 'batch'; it may be online, vendor_batch",
    ),
    (
        '[tenants.t]\napi_key = "k"\nwebhook_url = "ftp://x"',
        "3",
        "tenants.t.webhook_url: must be a URL such as https://example.com/hook, without credentials",
    ),
    (
        '[tenants.t]\napi_key = "k"\nwebhook_url = "https://:word@x/hook"',
        "3",
        "tenants.t.webhook_url: must be a URL such as https://example.com/hook, without credentials",
    ),
    ('[stores]\nredis_url = "http://x"', "2", "stores.redis_url: must be a URL that begins with redis:// or rediss://"),
    ('[stores]\ndatabase_url = "mysql://x"', "2", "stores.database_url: must be a URL that begins with postgresql://"),
    ('[stores]\ndata_dirs = "x"', "2", "stores.data_dirs: unknown key; did you mean 'data_dir'?"),
    ('[stores]\ndata_dir = ""', "2", "stores.data_dir: must not be empty"),
    ("[tracing]\nx = 1", "1", "tracing: is not supported by this version yet"),
    ("[server]\nworkers = 4", "2", "server.workers: is not supported by this version yet"),
    ('[server]\nsecret = "env:X"', "2", "server.secret: the environment variable X is not set"),
    ('[cache]\nfloat16 = "yes"', "2", "cache.float16: must be true or false"),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG_VALUES, ids=[row[2][:40] for row in WRONG_VALUES])
def test_a_wrong_value_is_told_with_file_line_key_and_mend(write: Any, text: str, line: str, message: str) -> None:
    """Every class of mistake names its line and says how to mend it."""
    told = refusal(write(text))
    key = message.partition(": ")[0]
    (one,) = [one for one in told if f": {key}: " in one]
    assert one.startswith(f"embedgate.toml:{line}: {message}"), told


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


def test_a_wrong_override_is_told_by_its_own_name(write: Any) -> None:
    """The message names the variable or the option, not a line of the file."""
    path = write(SMALL)
    assert refusal(path, {"EMBEDGATE_SERVER__PORT": "many"}) == [
        "EMBEDGATE_SERVER__PORT: server.port: must be a whole number"
    ]
    assert refusal(path, {"EMBEDGATE_SEVER__PORT": "1"}) == [
        "EMBEDGATE_SEVER__PORT: names nothing in the configuration; did you mean 'EMBEDGATE_SERVER__PORT'?"
    ]
    assert refusal(path, {"EMBEDGATE_SERVER__WORKERS": "2"}) == [
        "EMBEDGATE_SERVER__WORKERS: server.workers: is not supported by this version yet"
    ]
    assert refusal(path, host="0.0.0.0")[0].startswith("--host: server.host: '0.0.0.0' can be reached")


def test_the_environment_cannot_add_what_the_file_does_not_name(write: Any) -> None:
    """A deployment that exists only in the environment is a mistake, and so is one name for two deployments."""
    assert "names nothing" in refusal(write(SMALL), {"EMBEDGATE_DEPLOYMENTS__NEW__DIALECT": "local"})[0]
    twins = "".join(f'[deployments.{name}]\ndialect = "local"\n' for name in ("a-b", "a_b")) + SMALL
    assert "more than one thing" in refusal(write(twins), {"EMBEDGATE_DEPLOYMENTS__A_B__MODEL": "m"})[0]


def test_a_key_in_the_wrong_place_does_not_show(write: Any) -> None:
    """Credentials in a URL and a misspelt api_key are refused without being repeated."""
    text = SMALL.replace("http://", "http://me:hunter2@") + '[tenants.t]\napi_kee = "hunter2"\napi_key = "hunter2 "\n'
    told = "\n".join(refusal(write(text)))
    assert "did you mean 'api_key'?" in told
    assert "must hold no credentials" in told
    assert "hunter2" not in told
