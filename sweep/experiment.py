"""One experiment in a slot's clone: run it, then send its runs, its data and, last of all, its reference.

    python -m sweep.experiment NAME PUSH OVERRIDE…      ends when its standard input does

PUSH is empty where the slot shares the DVC cache with whoever wants the results.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from ruamel.yaml import YAML

from sweep.slot import git, reference

GRACE_S = 10  # for DVC to end; a stage sees by itself that its DVC is gone
ATTEMPTS, PAUSE_S = 3, 2  # for what depends on a network

current: list[subprocess.Popen[bytes]] = []


def main() -> None:
    threading.Thread(target=end_with_input, daemon=True).start()
    name, push, *overrides = sys.argv[1:]
    settings = [part for override in overrides for part in ("--set-param", override)]
    call("exp", "run", "--name", name, *(["--pull"] if push else []), *settings)
    if fell_back():
        sys.exit(
            "sweep: there is no MNIST here, and what came of the digits in its place is not compared with it; set "
            "MNIST_MIRROR for the workers, `dvc push` what has it, or sweep with -S data.dataset=digits"
        )
    call(program=[sys.executable, "-m", "mnist_vae.tracking.sender", "."], attempts=ATTEMPTS)
    if push:
        call("push", attempts=ATTEMPTS)
    push_reference(name)


def fell_back() -> bool:
    """Whether digits were taken in MNIST's place; the sweep's other experiments may have MNIST."""
    asked = YAML(typ="safe").load(Path("params.yaml"))["data"]["dataset"]
    taken = json.loads(Path("metrics/evaluate.json").read_text())["dataset"]
    return (asked, taken) == ("mnist", "digits")


def push_reference(name: str) -> None:
    """Push an experiment to the source, as `dvc exp push --no-cache` would, but with git.

    Where the source is a folder, DVC itself writes there, and if it is killed while it does, its lock stays and refuses
    this experiment from then on. With git, a process of the source's side writes, and a kill of this side spares it.
    """
    path = reference(git("rev-parse", "HEAD").strip(), name)
    call(program=["git", "push", "--quiet", "origin", f"{path}:{path}"], attempts=ATTEMPTS)


def call(*arguments: str, program: list[str] | None = None, attempts: int = 1) -> None:
    """Run DVC, or another program; leave with its status if it fails each time."""
    command = [*(program or [sys.executable, "-m", "dvc"]), *arguments]
    for attempt in range(1, attempts + 1):
        print("+", *command, flush=True)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": "src"},
            close_fds=False,  # the slot's lock, which it holds even if this process is killed
        )
        current[:] = [process]
        if process.wait() == 0:
            return
        if attempt < attempts:
            time.sleep(PAUSE_S * attempt)
    sys.exit(process.returncode if process.returncode > 0 else 1)


def end_with_input() -> None:
    """End with the worker that holds the other end of the standard input."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    for process in current:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    os._exit(1)


if __name__ == "__main__":
    Path(".dvc/tmp").mkdir(exist_ok=True)
    main()
