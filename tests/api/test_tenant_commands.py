"""What operators do with tenants, projects and keys from a shell: by exit code, output, and what a server then does."""

import asyncio
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_cli import embedgate, serving

CONFIGURATION = '[deployments.local]\ndialect = "local"\n[models.mini]\ndeployments = ["local"]\n'
FILED = CONFIGURATION + '[tenants.filed]\napi_key = "key-of-the-file"\nmodels = ["mini"]\n'


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command, which shows no traceback and none of the file's keys."""
    (folder / "embedgate.toml").write_text(FILED)
    shown = embedgate(*arguments, folder=folder)
    assert not re.search("Traceback|key-of-the-file", shown.stdout + shown.stderr)
    return shown


def told(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The JSON objects of its lines."""
    shown = run(folder, *arguments, "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    return [json.loads(line) for line in shown.stdout.splitlines()]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("tenants",), ("embedgate tenants create search", "within 5 s", "list", "delete")),
        (("tenants", "create"), ("--budget-usd-per-day 2.50", "--cache-group", "--webhook-url", "--bulk-tier")),
        (("tenants", "webhook-secret"), ("embedgate tenants webhook-secret search", "standardwebhooks.com")),
        (("projects", "set"), ("what is not named has", "--budget-usd-per-month")),
        (("tenants", "delete"), ("embedgate tenants delete crawler", "deleted tenant")),
        (("projects",), ("embedgate projects set search indexing", "x-embedgate-project")),
        (("keys", "create"), ("embedgate keys create --tenant search", "--network 10.0.0.0/8", "--expires 90d")),
        (("keys", "rotate"), ("--overlap 7d", "Both are good until")),
    ],
    ids=" ".join,
)
def test_help_teaches(tmp_path: Path, command: tuple[str, ...], says: tuple[str, ...]) -> None:
    """Lines to copy, and what they mean."""
    shown = embedgate(*command, "--help", folder=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [said for said in says if said not in shown.stdout] == []


def test_the_life_of_a_tenant_and_its_key(tmp_path: Path) -> None:
    """Made, shown, changed, rotated, revoked, deleted; money is exact, and the key shown once."""
    hook = ("--webhook-url", "https://example.com/hook?token=1")
    monthly = ("--budget-usd-per-month", "0.100000001")
    batched = ("--bulk-tier", "vendor_batch")
    (made,) = told(tmp_path, "tenants", "create", "search", "--weight", "2.5", *monthly, *hook, *batched)
    assert (made["name"], made["weight"], made["budget_usd_per_month"]) == ("search", 2.5, "0.100000001")
    assert (made["webhook_url"], made["bulk_tier"]) == (hook[1], "vendor_batch")
    (project,) = told(tmp_path, "projects", "set", "search", "ix", "--budget-usd-per-day", "1")
    assert project["budget_usd_per_day"] == "1.00"
    of_ix = ("--tenant", "search", "--project", "ix", "--budget-usd-per-day", "0.5")
    (key,) = told(tmp_path, "keys", "create", *of_ix, "--expires", "90d", "--label", "Ada")
    assert key["budget_usd_per_day"] == "0.50"
    assert re.fullmatch(f"eg_live_{key['id']}[0-9A-Za-z]{{49}}", key["key"])
    (changed,) = told(tmp_path, "tenants", "update", "search", "--budget-usd-per-month", "0", "--models", "mini")
    assert (changed["budget_usd_per_month"], changed["models"], changed["weight"]) == (None, ["mini"], 2.5)
    assert (changed["webhook_url"], changed["bulk_tier"]) == (hook[1], "vendor_batch")
    assert told(tmp_path, "tenants", "update", "search", "--bulk-tier", "online")[0]["bulk_tier"] == "online"
    assert re.fullmatch(r"whsec_[\w+/]{43}=\n", run(tmp_path, "tenants", "webhook-secret", "search").stdout)
    (rotated,) = told(tmp_path, "keys", "rotate", key["id"], "--overlap", "1h")
    assert (rotated["id"], rotated["key"] != key["key"]) == (key["id"], True)
    assert [each["projects"][0]["name"] for each in told(tmp_path, "tenants", "show", "search")] == ["ix"]
    assert [each["name"] for each in told(tmp_path, "tenants", "list")] == ["filed", "search"]
    (listed,) = told(tmp_path, "keys", "list", "--tenant", "search")
    assert ("key" in listed, listed["label"], listed["state"]) == (False, "Ada", "live")
    assert told(tmp_path, "keys", "revoke", key["id"])[0]["state"] == "revoked"
    assert told(tmp_path, "tenants", "delete", "search") == [{"name": "search", "deleted": True}]
    assert [each["name"] for each in told(tmp_path, "tenants", "list")] == ["filed"]


def test_people_are_shown_tables(tmp_path: Path) -> None:
    """A line for each, and the key apart from it."""
    run(tmp_path, "tenants", "create", "search", "--weight", "2.25", "--budget-usd-per-day", "2")
    run(tmp_path, "projects", "set", "search", "ix", "--budget-usd-per-month", "7.5")
    table = run(tmp_path, "tenants", "list").stdout
    assert [line.split()[0] for line in table.splitlines()] == ["NAME", "filed", "search"]
    assert "the file" in table
    assert "2.25" in table
    assert "2.00" in table
    tenant, project = run(tmp_path, "tenants", "show", "search").stdout.split("\n\n")
    assert tenant.split()[-2:] == project.split()[-2:] == ["0.00", "0.00"]
    assert project.split()[-4:-2] == ["-", "7.50"]
    shown = run(tmp_path, "keys", "create", "--tenant", "search").stdout
    assert re.search(r"^key  eg_live_\w{57}$", shown, re.MULTILINE)
    assert "Shown this once" in shown


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("tenants", "create", "a/b"), "The name of a tenant must be"),
        (("tenants", "create", "filed"), "There is a tenant 'filed' already."),
        (("tenants", "create", "t", "--budget-usd-per-day", "1.0000000001"), "at most 9 decimals"),
        (("tenants", "create", "t", "--budget-usd-per-day", "ten"), "--budget-usd-per-day: "),
        (("tenants", "create", "t", "--budget-usd-per-day", "9000001"), "must be dollars from 0 to 9000000"),
        (("tenants", "create", "t", "--webhook-url", "ftp://x"), "'webhook_url' must be a URL such as"),
        (("tenants", "webhook-secret", "nobody"), "There is no tenant 'nobody'."),
        (("tenants", "create", "t", "--priority", "first"), "--priority: "),
        (("tenants", "update", "t", "--bulk-tier", "cheap"), "--bulk-tier: "),
        (("tenants", "create", "t", "--models", "nobody"), "There is no model 'nobody'."),
        (("tenants", "update", "filed", "--weight", "2"), "is in the configuration file"),
        (("tenants", "show", "nobody"), "There is no tenant 'nobody'."),
        (("tenants", "delete", "nobody"), "There is no tenant 'nobody'."),
        (("projects", "set", "nobody", "p"), "There is no tenant 'nobody'."),
        (("keys", "create", "--tenant", "nobody"), "There is no tenant 'nobody'."),
        (("keys", "create", "--tenant", "filed", "--scopes", "embed,admin"), "its only scope is 'admin'"),
        (("keys", "create", "--tenant", "filed", "--network", "10.0.0.1/8"), "CIDR notation"),
        (("keys", "rotate", "nobody"), "There is no key 'nobody' in force."),
        (("keys", "revoke", "nobody"), "There is no key 'nobody'."),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_told_in_a_line(tmp_path: Path, command: tuple[str, ...], says: str) -> None:
    """With exit code 2."""
    shown = run(tmp_path, *command)
    assert (shown.returncode, shown.stdout) == (2, "")
    (line,) = shown.stderr.splitlines()
    assert line.startswith("embedgate: ")
    assert says in line


async def test_a_running_server_notices_what_is_done_beside_it(tmp_path: Path) -> None:
    """A key opens, then no more, each within 5 s, in another process than the command's."""
    (tmp_path / "embedgate.toml").write_text(CONFIGURATION)
    with serving(tmp_path) as (_, announced):
        url = announced[1].split()[-1]
        async with httpx.AsyncClient() as http:

            async def until(key: str, status: int) -> None:
                started = time.monotonic()
                headers = {"authorization": f"Bearer {key}"}
                while (await http.get(f"{url}/models", headers=headers)).status_code != status:
                    assert time.monotonic() - started <= 5
                    await asyncio.sleep(0.1)

            await until("anything", 200)
            await asyncio.to_thread(embedgate, "tenants", "create", "made", folder=tmp_path)
            made = await asyncio.to_thread(embedgate, "keys", "create", "--tenant", "made", "--json", folder=tmp_path)
            key = json.loads(made.stdout)
            await until("anything", 401)
            await until(key["key"], 200)
            await asyncio.to_thread(embedgate, "keys", "revoke", key["id"], folder=tmp_path)
            await until(key["key"], 401)
