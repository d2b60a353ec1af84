"""Run the committed pipeline anew, in a fresh clone, and say of every artifact whether it came out byte for byte.

    python -m tools.verify            exit status: 0 all equal, 1 some differ, 2 there is nothing to compare
    python -m tools.verify --keep     leaves the clone, to look into
    python -m tools.verify --record   writes metrics/environment.json, to be committed with results made here

The clone has the code, the parameters and the dvc.lock of HEAD, an empty DVC cache and an MLflow store of its own.
It runs with this interpreter and gets MNIST from where the pipeline gets it.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils.serialize import parse_yaml
from voluptuous import Invalid

from stages.outputs import hash_of, md5, remove
from tools.clone import ROOT, GitError, clone, environment, git
from tools.difference import difference
from tools.machine import processor
from tools.table import table

RECORD = "metrics/environment.json"  # no output of a stage: DVC would list it among the metrics
PACKAGES = ("torch", "numpy", "matplotlib")


class CannotVerifyError(Exception):
    """There is nothing to compare; the message says why."""


class Artifact(NamedTuple):
    """An output of a stage, as a dvc.lock has it."""

    stage: str
    path: str
    md5: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="verify", description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave the clone, to look into")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD}, to be committed with results made here")
    arguments = parser.parse_args()
    if arguments.record:
        (ROOT / RECORD).write_text(json.dumps(this_environment(), indent=2) + "\n", encoding="utf-8")
        return
    folder = Path(tempfile.mkdtemp(prefix="mnist-vae-verify-"))
    try:
        sys.exit(verify(folder / "mnist-vae"))
    except (CannotVerifyError, GitError, OSError, json.JSONDecodeError) as error:
        say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if arguments.keep:
            say(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def verify(folder: Path) -> int:
    """Clone HEAD to ``folder``, run it, print what came out; the exit status, 0 or 1."""
    if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != ROOT:
        raise CannotVerifyError(f"{ROOT} is no git repository of its own, so there is no committed run to compare with")
    if git("status", "--porcelain"):
        say("verifying HEAD, not your uncommitted changes")
    clone(folder)
    artifacts = read_lock((folder / "dvc.lock").read_bytes())
    dataset = json.loads((folder / "metrics/train.json").read_text())["dataset"]
    recorded = json.loads((folder / RECORD).read_text()) if (folder / RECORD).is_file() else {}

    say(f"running the pipeline of {git('rev-parse', '--short', 'HEAD').strip()} anew in {folder}")
    for artifact in artifacts:  # so that what is there afterwards was made there
        remove(folder / artifact.path)
    repro(folder, "download")
    check_dataset(json.loads((folder / "data/dataset.json").read_text())["name"], dataset)
    repro(folder)

    rows = compare(artifacts, folder, committed_content)
    results = [result for *_, result in rows]
    print(table(["stage", "artifact", "result"], rows))
    print("\n" + summary(results, recorded, this_environment()))
    return int(set(results) != {"equal"})


def read_lock(lock: bytes) -> list[Artifact]:
    """Every output of every stage of a dvc.lock."""
    try:
        stages = COMPILED_LOCKFILE_SCHEMA(parse_yaml(lock.decode(), "dvc.lock"))["stages"]
        return [Artifact(name, out["path"], out["md5"]) for name, stage in stages.items() for out in stage["outs"]]
    except (DvcException, Invalid, LookupError, UnicodeDecodeError) as error:
        raise CannotVerifyError("dvc.lock is damaged; `dvc repro` and `git commit` make a good one") from error


def committed_content(artifact: Artifact) -> bytes | None:
    """What the committed run made, from git or DVC's cache; None where neither has it."""
    try:
        content: bytes = DVCFileSystem(str(ROOT), rev="HEAD").read_bytes(artifact.path)
    except (DvcException, OSError):
        return None
    return content if md5(content) == artifact.md5 else None


def repro(folder: Path, *stages: str) -> None:
    """Run `dvc repro`; what it prints goes to stderr."""
    command = [sys.executable, "-m", "dvc", "repro", *stages]
    run = subprocess.run(command, cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL, stdout=2, check=False)
    if run.returncode:
        raise CannotVerifyError("`dvc repro` failed in the clone, see above: nothing to compare")


def check_dataset(name: str, committed: str) -> None:
    """Raise unless the new run has the data set of the committed one."""
    if name != committed:
        raise CannotVerifyError(
            f"nothing to compare: the committed run was made on {committed}, this one on {name}; "
            "where MNIST is out of reach, connect to a network or set MNIST_MIRROR"
        )


def compare(artifacts: list[Artifact], folder: Path, committed: Callable[[Artifact], bytes | None]) -> list[list[str]]:
    """Stage, path and result of each artifact: ``equal``, ``missing: …`` or ``differs: …``, with by how much."""
    known = {artifact.path for artifact in artifacts}
    new = [one for one in read_lock((folder / "dvc.lock").read_bytes()) if one.path not in known]
    results = [judge(artifact, folder / artifact.path, committed) for artifact in artifacts]
    results += ["differs: is not in the committed dvc.lock"] * len(new)
    return [[one.stage, one.path, result] for one, result in zip(artifacts + new, results, strict=True)]


def judge(artifact: Artifact, made: Path, committed: Callable[[Artifact], bytes | None]) -> str:
    """The result of one artifact, of which ``made`` is the new version and ``committed`` finds the old one."""
    if not made.exists():
        return "missing: was not made; is dvc.lock older than dvc.yaml?"
    if hash_of(made) == artifact.md5:
        return "equal"
    if made.is_dir():
        return "differs: other files are in the folder"
    old = committed(artifact)
    if old is None:
        return "differs: the old file is neither in git nor in the cache"
    return f"differs: {difference(made.suffix, old, made.read_bytes())}"


def this_environment() -> dict[str, str]:
    """What the last bits of a result depend on, beside code, data and params (the thread count is one of these)."""
    import torch

    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def summary(results: Iterable[str], recorded: Mapping[str, str], here: Mapping[str, str]) -> str:
    """The count of each result; where some differ, both environments."""
    words = [result.partition(":")[0] for result in results]
    counted = ", ".join(f"{words.count(word)} {word}" for word in ("equal", "differs", "missing") if word in words)
    if set(words) == {"equal"}:
        return f"The committed run is reproduced: {counted}."
    rows = [[name, recorded.get(name, "not recorded"), value] for name, value in here.items()]
    others = [name for name, before, now in rows if before != now]
    return (
        f"{counted}.\n\n{table(['', 'committed run', 'here'], rows)}\n\n"
        f"Other than in the committed run: {', '.join(others) or 'nothing, so the environment is not the reason'}. "
        "Another environment changes the last bits of a sum, and training carries them on; what counts then is by how "
        "much the losses differ."
    )


def say(message: str) -> None:
    print(f"verify: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
