"""PostgreSQL and deploy/mlflow-server.sh on free ports of this machine, for the tests and the benchmarks."""

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools.clone import ROOT, environment

PATIENCE_S = 120  # for a server to answer
SERVER = ROOT / "deploy/mlflow-server.sh"


def postgres_program(name: str) -> str | None:
    """A program of PostgreSQL; Debian puts those of a server beside the PATH."""
    beside = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: folder.parent.name)
    return shutil.which(name, path=os.pathsep.join([*map(str, reversed(beside)), os.environ.get("PATH", "")]))


@contextlib.contextmanager
def postgresql(safe: bool = True) -> Iterator[dict[str, str]]:
    """A cluster with an empty database ``mlflow`` until the end of the context; the PG… variables that lead to it.

    Root gives its processes to nobody, since PostgreSQL refuses root. Without ``safe`` it does not wait for the disk.
    """
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as name:
        folder, port, password = Path(name), free_port(), secrets.token_urlsafe()
        (folder / "password").write_text(password)
        if as_user:
            for path in (folder, folder / "password"):
                os.chown(path, as_user["user"], as_user["group"])
        common: dict[str, Any] = {"cwd": folder, "env": {"PATH": os.defpath, "LC_ALL": "C"}, **as_user}
        initdb = [postgres_program("initdb"), "--pgdata", "data", "--username", "mlflow", "--pwfile", "password"]
        initdb += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **common)
        server = [postgres_program("postgres"), "-D", "data", "-k", name, "-h", "127.0.0.1", "-p", str(port)]
        server += [] if safe else ["-c", "fsync=off", "-c", "full_page_writes=off"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(server, stdout=log, stderr=log, start_new_session=True, **common)
        found = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGPASSWORD": password}
        try:
            wait_for(lambda: _is_ready(found), process, folder / "log")
            psql(found | {"PGDATABASE": "postgres"}, "create database mlflow")
            yield found | {"PGDATABASE": "mlflow"}
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(timeout=60)


def psql(server: dict[str, str], query: str) -> list[list[str]]:
    """The rows that a query gives, as text."""
    command = [str(postgres_program("psql")), "--no-psqlrc", "--quiet", "--tuples-only", "--csv", "--command", query]
    done = subprocess.run(command, env={"PATH": os.defpath, **server}, check=True, capture_output=True, text=True)
    return [line.split(",") for line in done.stdout.splitlines()]


@dataclass
class TrackingServer:
    """What leads to a server that runs."""

    uri: str
    database: dict[str, str]  # PG… variables
    folder: Path  # its artifacts are in mlartifacts, what it says in log
    password: str
    users: dict[str, str] = field(default_factory=dict)  # passwords by name

    def add_user(self, name: str) -> dict[str, str]:
        """Make a user; the variables with which a client is this user."""
        password = secrets.token_urlsafe()
        self.post("/api/2.0/mlflow/users/create", {"username": name, "password": password})
        self.users[name] = password
        return self.variables(name, password)

    def variables(self, name: str, password: str) -> dict[str, str]:
        """What a client has in its environment."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def post(self, path: str, content: dict[str, str]) -> None:
        """Ask for something as the admin."""
        who = b64encode(f"admin:{self.password}".encode()).decode()
        headers = {"Authorization": f"Basic {who}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.uri}{path}", json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request, timeout=30):
            pass


@contextlib.contextmanager
def tracking_server(
    folder: Path, database: dict[str, str], workers: int = 2, **settings: str
) -> Iterator[TrackingServer]:
    """deploy/mlflow-server.sh over a database, with its artifacts in ``folder``, until the end of the context."""
    port, password = free_port(), secrets.token_urlsafe()
    settings |= {
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_PORT": str(port),
        "MLFLOW_WORKERS": str(workers),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [SERVER],
            cwd=folder,
            env=environment(folder, **database, **settings),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{uri}/health"), process, folder / "log")
        yield TrackingServer(uri, database, folder, password)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when a server answers.

    Raises:
        RuntimeError: it has ended, or does not answer; with the end of its log.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("a server does not answer:\n" + "\n".join(log.read_text().splitlines()[-20:]))
        time.sleep(0.1)


def _is_ready(server: dict[str, str]) -> bool:
    command = [str(postgres_program("pg_isready")), "--quiet"]
    return subprocess.run(command, env=server, check=False).returncode == 0


def answers(url: str) -> bool:
    """Whether a server says at an address that all is well."""
    with contextlib.suppress(OSError):
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    return False
