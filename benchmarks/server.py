"""A tracking server of MLflow on this machine that fails when it is told to."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tools.clone import environment
from tools.deployment import answers, free_port, wait_for


class Server:
    """``mlflow server`` over a database and a folder of artifacts in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.log = folder, free_port(), folder / "log"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        where = ("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        kept = ("--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *where, *kept],
                cwd=self.folder,
                env=environment(self.folder),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(lambda: answers(f"{self.uri}/health"), self.process, self.log)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and its workers."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def wait_for_a_run(self) -> None:
        wait_for(lambda: self.select("select count(*) from runs") != [(0,)], self.process, self.log)

    def steps(self, metric: str) -> list[int]:
        """The steps at which the runs have a metric, in order."""
        return [step for (step,) in self.select("select step from metrics where key = ? order by step", metric)]

    def select(self, query: str, *values: str) -> list[tuple[int, ...]]:
        """Rows of the server's database."""
        with contextlib.closing(sqlite3.connect(self.folder / "server.db")) as connection:
            return connection.execute(query, values).fetchall()


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[Server]:
    """A server that answers, until the end of the context."""
    folder.mkdir()
    server = Server(folder)
    try:
        yield server
    finally:
        server.kill()


def fail_three_times(server: Server, pause: float) -> None:
    """Kill the server and start it again, twice; then let it hang; ``pause`` seconds before each and for each."""
    for _ in range(2):
        time.sleep(pause)
        server.kill()
        time.sleep(pause)
        server.start()
    time.sleep(pause)
    server.signal(signal.SIGSTOP)
    time.sleep(pause)
    server.signal(signal.SIGCONT)


def synchronise(workspace: Path, uri: str) -> None:
    """Send a server what a workspace's journal still has for it."""
    command = [sys.executable, "-m", "mnist_vae.tracking.sender", str(workspace)]
    subprocess.run(command, env=environment(workspace, MLFLOW_TRACKING_URI=uri), check=True, stdout=subprocess.DEVNULL)
