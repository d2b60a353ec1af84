"""A tracking server of MLflow on this machine that fails when it is told to."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.clone import environment

TIME_LIMIT_S = 120  # for the server to answer, and for a training to come to its first run


class Server:
    """``mlflow server`` over a database and a folder of artifacts in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        where = ("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        kept = ("--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *where, *kept],
            cwd=self.folder,
            env=environment(self.folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and its workers."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def wait_until_it_answers(self) -> None:
        self._wait(lambda: socket.socket().connect_ex(("127.0.0.1", self.port)) == 0)

    def wait_for_a_run(self) -> None:
        self._wait(lambda: self.select("select count(*) from runs") != [(0,)])

    def steps(self, metric: str) -> list[int]:
        """The steps at which the runs have a metric, in order."""
        return [step for (step,) in self.select("select step from metrics where key = ? order by step", metric)]

    def select(self, query: str, *values: str) -> list[tuple[int, ...]]:
        """Rows of the server's database."""
        with contextlib.closing(sqlite3.connect(self.folder / "server.db")) as connection:
            return connection.execute(query, values).fetchall()

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIME_LIMIT_S
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise TimeoutError(f"the MLflow server has ended, or was not used within {TIME_LIMIT_S} s")
            time.sleep(0.1)


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[Server]:
    """A server that answers, until the end of the context."""
    folder.mkdir()
    server = Server(folder)
    try:
        server.wait_until_it_answers()
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
        server.wait_until_it_answers()
    time.sleep(pause)
    server.signal(signal.SIGSTOP)
    time.sleep(pause)
    server.signal(signal.SIGCONT)


def synchronise(workspace: Path, uri: str) -> None:
    """Send a server what a workspace's journal still has for it."""
    command = [sys.executable, "-m", "mnist_vae.tracking.sender", str(workspace)]
    subprocess.run(command, env=environment(workspace, MLFLOW_TRACKING_URI=uri), check=True, stdout=subprocess.DEVNULL)
