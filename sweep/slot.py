"""What a Dask worker does with one experiment: a clone at the commit, and `python -m sweep.experiment` in it.

This module travels to the worker by value, so the worker needs git, and an environment made from requirements.lock,
but no copy of the project. Everything may be done twice, and cut off anywhere, without another result.
"""

import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

FOLDER = "sweep-slots"  # in a worker's current folder, unless its SWEEP_FOLDER names another
FOREIGN = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # of another repository
PATIENCE_S = 60  # for a stage whose DVC was killed, which ends within seconds
REFERENCE = "refs/exps/{}/{}/{}"  # DVC's own: two and 38 digits of the commit, and the experiment's name


class Sweep(NamedTuple):
    """What all experiments of a sweep have in common."""

    commit: str
    source: str  # git URL or folder to clone from, and to push experiments to
    cache: str = ""  # the DVC cache that all slots share; empty: each has its own, and a DVC remote
    folder: str = ""  # where the slots are; empty: up to each worker
    environment: Mapping[str, str] = {}  # beside the worker's own
    identity: Mapping[str, str] = {}  # git's user.name and user.email, for a worker that has none


class Outcome(NamedTuple):
    """How an experiment ended on a worker."""

    name: str
    error: str = ""  # one line; empty: all is well
    log: str = ""  # host and file


def reference(commit: str, name: str) -> str:
    """Where git keeps a DVC experiment."""
    return REFERENCE.format(commit[:2], commit[2:], name)


def run_experiment(sweep: Sweep, name: str, overrides: list[str]) -> Outcome:
    """Run an experiment in the first free slot of this worker's folder, unless it is there already."""
    from distributed import Lock

    # A worker that has lost its driver, or was given up by the scheduler, may still be at this very experiment. The
    # scheduler takes a lock back from a worker that is silent for half a minute.
    with Lock(f"{sweep.commit} {name}"):
        return run_in_slot(sweep, name, overrides)


def run_in_slot(sweep: Sweep, name: str, overrides: list[str]) -> Outcome:
    """The same where nobody else is at this experiment."""
    folder = Path(sweep.folder or os.environ.get("SWEEP_FOLDER", FOLDER)).absolute()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    log = folder / "logs" / f"{name}.log"
    with free_slot(folder) as (slot, lock), log.open("w+") as output:
        try:
            if is_there(sweep, name):
                return Outcome(name)
            prepare(slot, sweep)
            remove_reference(slot, sweep, name)
            command = [sys.executable, "-m", "sweep.experiment", name, "" if sweep.cache else "push", *overrides]
            # The experiment ends when its standard input does: with this process, however that ends. It holds the
            # slot's lock for as long as it or what it calls lives; a stage has a lock of its own.
            process = subprocess.Popen(
                command,
                cwd=slot,
                env=environment(sweep),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C at the driver is not for the experiment, which would call it failed
            )
            if process.wait() == 0:
                return Outcome(name)
            error = reason(log.read_text(errors="replace"), f"ended with status {process.returncode}")
            with suppress(subprocess.CalledProcessError):
                if is_there(sweep, name):  # another scheduler's worker was first
                    return Outcome(name)
        except subprocess.CalledProcessError as failure:
            said = (failure.stderr or "").splitlines()
            fatal = [line for line in said if line.startswith(("fatal: ", "error: "))]
            error = (fatal or said or ["no reason given"])[0].replace("fatal: ", "git: ")
            output.write(failure.stderr or "")
        except OSError as failure:
            error = str(failure)
        return Outcome(name, error, f"{socket.gethostname()}:{log}")


@contextmanager
def free_slot(folder: Path) -> Iterator[tuple[Path, int]]:
    """A slot that nobody uses, with the descriptor of its lock, which whoever inherits it holds on to."""
    for number in range(10_000):
        with (folder / f"slot-{number}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield folder / f"slot-{number}", file.fileno()
            return


def is_there(sweep: Sweep, name: str) -> bool:
    """Whether the source has the experiment, which it gets when all else is done."""
    return bool(git("ls-remote", sweep.source, reference(sweep.commit, name)))


def prepare(slot: Path, sweep: Sweep) -> None:
    """Make the slot a clone at the sweep's commit, whatever was left there, once the last stage in it has ended.

    Raises:
        TimeoutError: a stage does not end.
        subprocess.CalledProcessError: git failed.
    """
    if not is_repository(slot):
        scratch = slot.with_suffix(".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(slot, ignore_errors=True)
        git("clone", "--quiet", "--no-checkout", sweep.source, str(scratch))
        scratch.rename(slot)
    # This process alone uses the slot, so what locks it is left from one that was killed.
    for left in (slot / ".git").rglob("*.lock"):
        left.unlink(missing_ok=True)
    lock = slot / ".dvc" / "tmp" / "stage.lock"  # a stage holds it for as long as it lives, and writes there who it is
    try:
        with FileLock(lock, timeout=PATIENCE_S):
            shutil.rmtree(lock.parent, ignore_errors=True)
    except Timeout as error:
        raise TimeoutError(f"another stage still works in {slot} ({lock.read_text()}); end that process") from error
    for entry, value in {"remote.origin.url": sweep.source, **sweep.identity}.items():
        git("config", entry, value, folder=slot)
    git("fetch", "--quiet", "--prune", "origin", "+refs/heads/*:refs/remotes/origin/*", folder=slot)
    if not git("rev-parse", "--verify", "--quiet", f"{sweep.commit}^{{commit}}", folder=slot, check=False):
        git("fetch", "--quiet", "origin", "HEAD", folder=slot)  # the commit is on no branch
    git("checkout", "--quiet", "--force", "--detach", sweep.commit, folder=slot)
    git("clean", "--quiet", "--force", "-d", folder=slot)
    if sweep.cache:
        (slot / ".dvc" / "config.local").write_text(f'[cache]\n    dir = "{sweep.cache}"\n', encoding="utf-8")


def is_repository(slot: Path) -> bool:
    """Whether git can work in a slot, which a power cut may have left with an empty file."""
    try:
        git("status", "--porcelain", folder=slot)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def remove_reference(slot: Path, sweep: Sweep, name: str) -> None:
    """Forget an experiment that was made here and not pushed: DVC's cache has what it made."""
    git("update-ref", "-d", reference(sweep.commit, name), folder=slot)


def environment(sweep: Sweep) -> dict[str, str]:
    """This worker's own, with this interpreter first and the sweep's settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)])
    return {**own, **sweep.environment, "PATH": path}


def git(*arguments: str, folder: Path | None = None, check: bool = True) -> str:
    """What git prints, of the repository in a folder; never of one above it.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    if folder is not None:
        own["GIT_CEILING_DIRECTORIES"] = str(folder.absolute().parent)
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env={**own, "GIT_TERMINAL_PROMPT": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        done.check_returncode()
    return done.stdout


def reason(printed: str, otherwise: str) -> str:
    """The line that says most about a failure: the last one of a stage or a program about itself."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"(?!ERROR: failed to reproduce)(?!WARNING)[\w. ]+: \S", line)]
    return (telling or lines or [otherwise])[-1]
