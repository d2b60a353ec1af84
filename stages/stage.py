"""Running a stage: one at a time, in one line if it fails, without a trace if it is stopped."""

import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
from filelock import FileLock, Timeout

from mnist_vae.errors import UserError
from mnist_vae.files import writable
from mnist_vae.tracking.session import Session, Status
from stages import PARENT, WORKSPACE, outputs

LOCK = Path(".dvc/tmp/stage.lock")
LOCK_TIMEOUT_S = 60  # a stage whose dvc was killed ends within seconds
GRACE_S = 15  # for a stage to end in order after its dvc is gone
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHELLS = {"sh", "bash", "dash", "zsh", "fish"}


class Stopped(SystemExit):
    """A signal asks the stage to end; its exit status is the one that a shell gives for this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


def run_stage(name: str) -> None:
    """Call the ``main`` of stages/NAME.py and leave the process with status 0, 1 for a failure, 128 + N for a signal.

    Whatever ends it, the outputs of the last success are there again, or none.
    """
    logging.basicConfig(format=f"{name}: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        end_on_signals()
        if name == "train" and not is_first_process():
            run_work(name)
            return
        end_with_dvc()
        with only_stage_here(name):
            outputs.check_cache()
            run_tracked(name)
    except UserError as error:
        sys.exit("\n".join(f"{name}: {line}" for line in str(error).splitlines()))


def is_first_process() -> bool:
    """Whether this process of a training is the first on the first host, which alone writes and tracks."""
    return all(os.environ.get(name, "0") in ("", "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def run_work(name: str) -> None:
    """The share that another process has in a stage. Where the first of this host tells why all end, it is silent."""
    from mnist_vae.training.processes import LOST_STATUS, ProcessLostError

    if is_started := "LOCAL_RANK" in os.environ:
        end_with(psutil.Process(PARENT))
    try:
        importlib.import_module(f"stages.{name}").work()
    except ProcessLostError:
        if is_started:
            sys.exit(LOST_STATUS)
        raise
    finally:
        for number in SIGNALS:  # that the others end, too, must not cut this short
            signal.signal(number, signal.SIG_IGN)


def run_tracked(name: str) -> None:
    """The stage, with what it tells MLflow, which is ended as the stage is."""
    session = Session(WORKSPACE, name) if name != "download" else None
    try:
        with writable(Path.cwd()):
            main = importlib.import_module(f"stages.{name}").main
            main() if session is None else main(session)
        outputs.put_into_cache(name)
    except BaseException as error:
        outputs.restore(name)
        status, reason = in_words(error)
        if session is not None:
            session.end(status, reason, wait=GRACE_S - 5)
        if isinstance(error, UserError) and (damaged := outputs.remove_damaged(name)):
            files = " and ".join(map(str, damaged))
            raise UserError(
                f"{error}\n{files} was damaged on the disk, and so was DVC's copy; both are removed now: "
                "run `dvc repro` again, and it is made anew"
            ) from error
        raise
    if session is not None:
        session.end("FINISHED")
        if session.outcome.get("champion"):
            print("champion: `mlflow models serve -m models:/mnist-vae-decoder@champion` answers with this model")


def in_words(error: BaseException) -> tuple[Status, str]:
    """How MLflow calls the end that an exception brings, and the reason to record."""
    if isinstance(error, Stopped):
        return "KILLED", error.signal
    return "FAILED", (str(error).splitlines() or [""])[0] or type(error).__name__


@contextmanager
def only_stage_here(name: str) -> Iterator[None]:
    """Hold the folder for this stage.

    DVC takes its own lock for stale when its process was killed, and would start a stage beside one that still runs.

    Raises:
        UserError: another stage did not end in time; the message names its process.
    """
    if not LOCK.parent.parent.is_dir():  # no DVC here: somebody runs a stage by hand
        yield
        return
    with writable(LOCK):
        LOCK.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = LOCK.read_text() if LOCK.is_file() else ""
            print(f"{name}: waiting for another stage in this folder to end ({holder})", file=sys.stderr)
            try:
                lock.acquire(timeout=LOCK_TIMEOUT_S)
            except Timeout as error:
                raise UserError(
                    f"another stage still works in this folder ({holder}); wait for it, or end that process"
                ) from error
        os.truncate(LOCK, 0)
        LOCK.write_text(f"{name}, process {os.getpid()}")
    try:
        yield
    finally:
        lock.release()


def end_on_signals() -> None:
    """Have Ctrl-C, SIGTERM and SIGHUP end the stage in order, unless they are ignored, as SIGHUP is under nohup."""
    is_stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if not is_stopping:  # once is enough: what follows must not be cut short
            is_stopping = True
            raise Stopped(number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def end_with_dvc() -> None:
    """End this stage when the DVC that started it is gone, however it went: nobody would record what the stage makes.

    A stage without DVC is its own master.
    """
    if "DVC_STAGE" not in os.environ:
        return
    if os.getppid() != PARENT:  # gone already
        raise Stopped(signal.SIGTERM)
    ancestors = (parent for parent in psutil.Process().parents() if parent.name() not in SHELLS)
    if (dvc := next(ancestors, None)) is not None:
        end_with(dvc)


def end_with(other: psutil.Process) -> None:
    """End this process when another one has ended."""

    def watch() -> None:
        while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
