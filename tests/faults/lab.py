"""A laboratory for one fault: a clone of the project at some stage of its pipeline, and what it takes to break it.

The clones begin as copies of an undisturbed run, which stays for comparison. Every copy is a real one: nothing that is
done to it reaches the original.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from tests.pipeline import TINY, clone_working_tree, commit, environment, run, set_params
from tests.tracking import relocate_store

State = Literal["fresh", "downloaded", "trained", "finished"]
EPOCHS = 4
PARAMS = TINY | {"train.epochs": EPOCHS}
STAGES = ("download", "train", "evaluate", "render_samples", "render_grid")
NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused
OFFLINE = {"MNIST_MIRROR": "", "http_proxy": NOBODY, "https_proxy": NOBODY, "no_proxy": "127.0.0.1"}


def make_states(folder: Path) -> Path:
    """The undisturbed run in ``folder``: copies of the clone at its start, after download, after train, at its end."""
    clone = clone_working_tree(folder / "fresh")
    run(clone, "git", "config", "maintenance.auto", "false")  # it would change a clone while that is copied
    with (clone / ".git/info/exclude").open("a") as file:
        file.write("/src/sitecustomize.py\n")
    set_params(clone, PARAMS)
    commit(clone, "Small parameters")
    run(copy(folder, "fresh", folder / "downloaded"), "dvc", "repro", "download")
    run(copy(folder, "downloaded", folder / "trained"), "dvc", "repro", "train")
    run(copy(folder, "trained", folder / "finished"), "dvc", "repro")
    return folder


def copy(states: Path, state: str, target: Path) -> Path:
    """A copy of the clone in a state; its MLflow store says that artifacts are where they are now."""
    source = states / state
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--archive", source, target], check=True)
    shutil.copy(Path(__file__).with_name("interfere.py"), target / "src/sitecustomize.py")
    relocate_store(source, target)
    return target


class Lab:
    """One clone, the environment of its commands, and what is to be cleared away at the end."""

    def __init__(self, states: Path, folder: Path, seed: str, stack: ExitStack) -> None:
        self.states, self.folder, self.stack = states, folder, stack
        self.random = random.Random(seed)
        self.env: dict[str, str] = {}  # of all commands that follow
        self.notes = folder / "notes.txt"
        self.next_says: tuple[str, ...] = ()  # by the `dvc repro` that recovers
        self.prefix: tuple[str, ...] = ()  # of all commands that follow, as runuser
        self.clone = folder / "mnist-vae"
        self.database: Path | None = None  # of the store, where it is not in the clone
        self.lost_frames: tuple[int, ...] = ()  # epochs of which MLflow has no picture
        self.tellers = 1  # clones that tell one store of the same training at the same time
        self.other_trainings = 0  # that a fault leaves a run of, beside the one of the undisturbed run
        stack.callback(self.kill_all)

    def begin(self, state: State = "downloaded", clone: Path | None = None) -> Path:
        """A fresh copy of the clone in a state, in place of the one that is there."""
        self.kill_all()
        self.clone = clone or self.clone
        shutil.rmtree(self.clone, ignore_errors=True)
        return copy(self.states, state, self.clone)

    # commands

    def run(self, *argv: str | Path, env: Mapping[str, str] | None = None, timeout: float = 300) -> "Said":
        """Run a command in the clone to its end. It must not show a traceback."""
        return self.start(*argv, env=env).wait(timeout)

    def repro(self, *arguments: str, env: Mapping[str, str] | None = None) -> "Said":
        """`dvc repro`, which must succeed."""
        return self.run("dvc", "repro", *arguments, env=env).succeeded()

    def fail(self, *arguments: str, env: Mapping[str, str] | None = None) -> "Said":
        """`dvc repro`, which must fail, with a message and without a traceback."""
        return self.run("dvc", "repro", *arguments, env=env).failed()

    def stage(self, name: str, env: Mapping[str, str] | None = None) -> "Said":
        """A stage by itself, as `dvc repro` would run it."""
        return self.run(*self.stage_command(name), env=env)

    def stage_command(self, name: str) -> tuple[str, ...]:
        return ("env", "PYTHONPATH=src", sys.executable, "-m", "stages", name)

    def sync(self, env: Mapping[str, str] | None = None) -> "Said":
        """`make sync`."""
        return self.run("env", "PYTHONPATH=src", sys.executable, "-m", "mnist_vae.tracking.sender", ".", env=env)

    def remedies(self) -> str:
        """What `make run` says when `dvc repro` has failed."""
        return self.run(sys.executable, "-m", "tools.remedies").text

    def start(self, *argv: str | Path, env: Mapping[str, str] | None = None) -> "Command":
        """Begin a command in the clone, in a process group of its own."""
        output = self.folder / f"output-{len(list(self.folder.glob('output-*')))}.txt"
        whole = environment(self.clone, **self.env, **(env or {}))
        command = Command([*self.prefix, *map(str, argv)], self.clone, whole, output)
        self.stack.callback(command.end)
        return command

    # what goes wrong

    def rules(self, *given: Mapping[str, Any]) -> dict[str, str]:
        """The environment in which calls go wrong, see interfere.py."""
        self.notes.unlink(missing_ok=True)
        return {"FAULT_RULES": json.dumps(given), "FAULT_NOTES": str(self.notes)}

    def assert_interfered(self) -> None:
        """Assert that a rule has found its call."""
        assert self.notes.exists(), "the call that was to go wrong was never made"

    # processes

    def processes(self) -> list[psutil.Process]:
        """Every process that works in the clone."""
        return [process for process in psutil.process_iter() if works_in(process, self.clone)]

    def kill_all(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def process_of(self, stage: str, timeout: float = 60) -> psutil.Process:
        """The process of a stage, once it is there."""
        return self.wait_for(lambda: self.find("stages", stage), f"the stage {stage}", timeout)

    def sender_of(self, stage: str) -> psutil.Process:
        """The process that sends a stage's journal to MLflow, once it is there."""
        return self.wait_for(lambda: self.find("mnist_vae.tracking.sender", stage), f"the sender of {stage}")

    def find(self, module: str, stage: str) -> psutil.Process | None:
        for process in self.processes():
            line = command_line(process)
            if module in line and stage in line and "-c" not in line and "strace" not in line[0]:
                return process
        return None

    def wait_for(self, condition: Callable[[], Any], what: str, timeout: float = 60) -> Any:
        """What ``condition`` returns as soon as it is true."""
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}"
            time.sleep(0.02)
        return found

    def wait_for_quiet(self, timeout: float = 40) -> None:
        """Wait until no process works in the clone any more."""
        self.wait_for(lambda: not self.processes(), "every process of the clone to end", timeout)

    # where training is

    def records(self) -> list[dict[str, Any]]:
        """What stands in the journals of the clone."""
        found = []
        for path in self.clone.glob("journal/*/records.jsonl"):
            for line in path.read_bytes().splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def wait_for_epoch(self, epoch: int) -> None:
        """Wait until the journal has the losses of an epoch."""
        self.wait_for(lambda: epoch in self.epochs(), f"epoch {epoch}")

    def epochs(self) -> list[int]:
        return [one["step"] for one in self.records() if "train/loss" in one.get("values", {})]

    # the store

    def store(self) -> Path:
        return self.database or self.clone / "mlflow.db"

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows that a statement finds in the store's database."""
        with closing(sqlite3.connect(self.store(), timeout=30)) as store, store:
            return store.execute(statement, values).fetchall()


def heed_signals() -> None:
    """Undo what tests that run in the background inherit, which is to ignore Ctrl-C."""
    for name in ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


class Said:
    """How a command ended: its exit status, and all that it printed."""

    def __init__(self, status: int, text: str, seconds: float) -> None:
        self.status, self.text, self.seconds = status, text, seconds

    def succeeded(self) -> "Said":
        assert self.status == 0, f"status {self.status}\n{self.text}"
        return self

    def failed(self) -> "Said":
        assert self.status != 0, f"status 0\n{self.text}"
        return self

    def says(self, *parts: str) -> "Said":
        """Assert that each of the texts was printed."""
        for part in parts:
            assert part in self.text, f"{part!r} is not in\n{self.text}"
        return self


class Command:
    """A command that runs, in a process group of its own."""

    def __init__(self, argv: list[str], folder: Path, env: Mapping[str, str], output: Path) -> None:
        self.begun = time.monotonic()
        self.output = output
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                argv,
                cwd=folder,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=heed_signals,
            )

    def wait(self, timeout: float = 300) -> Said:
        """Wait for its end; none of our programs may show a traceback."""
        status = self.process.wait(timeout)
        text = self.output.read_text(errors="replace")
        assert "Traceback" not in text, text
        return Said(status, text, time.monotonic() - self.begun)

    def signal(self, name: str) -> None:
        """Send a signal to the whole process group, as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, getattr(signal, name))

    def end(self) -> None:
        """Kill the whole process group."""
        self.signal("SIGKILL")
        self.process.wait()


def works_in(process: psutil.Process, folder: Path) -> bool:
    """Whether a process has its current folder in a folder, or names it on its command line."""
    if process.pid == os.getpid():
        return False
    try:
        here = process.cwd()
    except (psutil.Error, OSError):
        here = ""
    return Path(here).is_relative_to(folder) or str(folder) in command_line(process)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def needs(*programs: str) -> None:
    """Skip where this is not Linux, the user not root, or a program is not there."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux")
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
