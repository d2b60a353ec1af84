"""Run the committed pipeline anew, in a fresh clone, and say of every artifact whether it came out byte for byte.

    python -m tools.verify            exit status: 0 all equal, 1 some differ, 2 there is nothing to compare
    python -m tools.verify --keep     leaves the clone, to look into
    python -m tools.verify --record   writes metrics/environment.json, to be committed with results made here

The clone has the code, the parameters and the dvc.lock of HEAD, an empty DVC cache and an MLflow store of its own.
It runs with this interpreter and gets MNIST from where the pipeline gets it.

Two artifacts may differ in a known way. models/run_id names the MLflow run, a new one each time.
metrics/report.md names the commit that it was made at, which cannot be the one that holds its own hash.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

ABOUT_DATASET, RUN_ID, REPORT, LOSSES = "data/dataset.json", "models/run_id", "metrics/report.md", "metrics/train.json"

# What the last bits of a result depend on, beside code, data and params (the thread count is one of these). It is no
# output of a stage: DVC would list it among the metrics.
RECORD = Path("metrics/environment.json")
CIRCUMSTANCES = ("platform", "cpu", "instructions", "python", "torch", "numpy", "matplotlib")

COMMIT = re.compile(rb"(?<=\| code, git commit \| `)[^`]*")  # as metrics/report.md names it
FOREIGN = ("DVC_", "MLFLOW_", "GIT_")  # variables that name another workspace, store or repository

Result = Literal["equal", "expected", "differs", "missing"]


class CannotVerifyError(Exception):
    """There is nothing to compare; the message says why."""


class Artifact(NamedTuple):
    """An output of a stage, as a dvc.lock has it."""

    stage: str
    path: str
    md5: str


class Comparison(NamedTuple):
    """What became of an artifact in the new run."""

    artifact: Artifact
    result: Result
    note: str = ""


Committed = Callable[[Artifact], bytes | None]  # the content of an artifact, None where it is not to be had


def main() -> None:
    parser = argparse.ArgumentParser(prog="verify", description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave the clone, to look into")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD}, to be committed with results made here")
    arguments = parser.parse_args()
    if arguments.record:
        (ROOT / RECORD).write_text(json.dumps(circumstances(), indent=2) + "\n", encoding="utf-8")
        return
    try:
        sys.exit(verify(keep=arguments.keep))
    except (CannotVerifyError, OSError) as error:
        print(f"verify: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def verify(*, keep: bool) -> int:
    """Clone HEAD, run it, print what came out; the exit status, 0 or 1."""
    head = find_head()
    artifacts = read_lock(git("show", "HEAD:./dvc.lock"))
    dataset = read_json(LOSSES, git("show", f"HEAD:./{LOSSES}"))["dataset"]
    recorded = read_json(RECORD, git("show", f"HEAD:./{RECORD}", check=False) or b"{}")

    with temporary_folder(keep=keep) as folder:
        clone = make_clone(folder, artifacts)
        say(f"running the pipeline of {head[:10]} anew in {clone}")
        dvc(clone, "repro", *(artifact.stage for artifact in artifacts if artifact.path == ABOUT_DATASET))
        check_dataset(json.loads((clone / ABOUT_DATASET).read_text()), dataset)
        dvc(clone, "repro")

        comparisons = compare(artifacts, clone, committed_content, commit_names())

    print(table([("stage", "artifact", "result"), *map(row, comparisons)]))
    print("\n" + summary(comparisons, recorded, circumstances()))
    return int(not is_reproduced(comparisons))


# The committed run


def find_head() -> str:
    """The commit to verify; a notice where the working tree is another."""
    top = Path(os.fsdecode(git("rev-parse", "--show-toplevel")).strip())
    if top.resolve() != ROOT:
        raise CannotVerifyError(f"{ROOT} is no git repository of its own, so there is no committed run to compare with")
    head = git("rev-parse", "--verify", "HEAD").decode().strip()
    if git("status", "--porcelain").strip():
        say("verifying HEAD, not your uncommitted changes")
    return head


def read_lock(lock: bytes) -> list[Artifact]:
    """Every output of every stage of a dvc.lock."""
    from ruamel.yaml import YAML, YAMLError

    try:
        stages = YAML(typ="safe", pure=True).load(lock)["stages"]
        found = [
            Artifact(name, out["path"], out["md5"]) for name, stage in stages.items() for out in stage.get("outs", [])
        ]
    except (YAMLError, LookupError, AttributeError, TypeError) as error:
        raise CannotVerifyError("dvc.lock is damaged; `dvc repro` and `git commit` make a good one") from error
    if not found:
        raise CannotVerifyError("dvc.lock names no artifact; `dvc repro` and `git commit` make one that does")
    return found


def read_json(name: str | Path, content: bytes) -> dict[str, Any]:
    """A committed file of entries."""
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise CannotVerifyError(f"{name} is damaged; `dvc repro` and `git commit` make a good one") from error


def circumstances() -> dict[str, str]:
    """Those of this machine and this environment, under the names in CIRCUMSTANCES."""
    import torch

    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else []
    packages = ("torch", "numpy", "matplotlib")
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": models[0] if models else platform.processor() or "unknown",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def committed_content(artifact: Artifact) -> bytes | None:
    """The very bytes that dvc.lock names, from git or from DVC's cache."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        cached = Path(repo.cache.local.oid_to_path(artifact.md5))
    in_git = git("show", f"HEAD:./{artifact.path}", check=False)
    in_cache = cached.read_bytes() if cached.is_file() else b""
    return next((content for content in (in_git, in_cache) if md5(content) == artifact.md5), None)


def commit_names() -> list[bytes]:
    """What metrics/report.md may have called the commit that it was made at, newest first."""
    hashes = git("rev-list", "HEAD").split()
    return [name + suffix for name in hashes for suffix in (b" with changes", b"")]


# The new run


@contextmanager
def temporary_folder(*, keep: bool) -> Iterator[Path]:
    """A folder that is gone afterwards, unless it is to be kept."""
    folder = Path(tempfile.mkdtemp(prefix="mnist-vae-verify-"))
    try:
        yield folder
    finally:
        if keep:
            say(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def make_clone(folder: Path, artifacts: Iterable[Artifact]) -> Path:
    """A clone of HEAD without any artifact, so that what is there after the run was made by it."""
    clone = folder / "mnist-vae"
    git("clone", "--quiet", str(ROOT), str(clone))
    (clone / ".dvc" / "config.local").write_text("[cache]\n    dir = cache\n")  # whatever the user's own config says
    for artifact in artifacts:
        (clone / artifact.path).unlink(missing_ok=True)
    return clone


def dvc(clone: Path, *arguments: str) -> None:
    """Run DVC in the clone; what it prints goes to stderr."""
    env = environment() | {"DVC_SITE_CACHE_DIR": str(clone.parent / "site-cache")}
    command = [sys.executable, "-m", "dvc", *arguments]
    status = subprocess.run(command, cwd=clone, env=env, stdin=subprocess.DEVNULL, stdout=2, check=False).returncode
    if status != 0:
        raise CannotVerifyError(f"`dvc {' '.join(arguments)}` failed in the clone, see above: nothing to compare")


def environment() -> dict[str, str]:
    """This environment for a clone: this interpreter, the same source of MNIST, no other workspace or store."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    mirror = env.get("MNIST_MIRROR")
    if mirror and "://" not in mirror:
        env["MNIST_MIRROR"] = str(ROOT / mirror)
    return env


def check_dataset(about: Mapping[str, Any], committed: str) -> None:
    """Raise unless the new run has the data set of the committed one."""
    name, asked_for = about["name"], about["asked_for"]
    if name == committed:
        return
    problem = f"nothing to compare: the committed run was made on {committed}, this one on {name}"
    if name != asked_for:
        problem += f", because {asked_for} is out of reach; connect to a network or set MNIST_MIRROR"
    raise CannotVerifyError(problem)


# The comparison


def compare(
    artifacts: Iterable[Artifact], folder: Path, committed: Committed, commits: Iterable[bytes]
) -> list[Comparison]:
    """Each artifact beside the file of the same path in ``folder``, and what only the folder's dvc.lock has."""
    artifacts, commits = list(artifacts), list(commits)
    known = {artifact.path for artifact in artifacts}
    lock = folder / "dvc.lock"
    added = [one for one in read_lock(lock.read_bytes()) if one.path not in known]
    return [judge(artifact, folder / artifact.path, committed, commits) for artifact in artifacts] + [
        Comparison(artifact, "differs", "is not in the committed dvc.lock") for artifact in added
    ]


def judge(artifact: Artifact, file: Path, committed: Committed, commits: Iterable[bytes]) -> Comparison:
    """One artifact beside one file."""
    if not file.is_file():
        return Comparison(artifact, "missing", "was not made; is dvc.lock older than dvc.yaml?")
    new = file.read_bytes()
    if md5(new) == artifact.md5:
        return Comparison(artifact, "equal")
    if artifact.path == RUN_ID:
        return Comparison(artifact, "expected", "a new MLflow run each time")
    old = committed(artifact)
    if artifact.path == REPORT:
        names = COMMIT.findall(old) if old else commits
        if any(md5(COMMIT.sub(name, new)) == artifact.md5 for name in names):
            return Comparison(artifact, "expected", "names another commit, and is equal in all else")
        if old is None:
            return Comparison(artifact, "expected", "names another commit; its old text is not in the DVC cache")
    if old is None:
        return Comparison(artifact, "differs", "by how much is not known: the old file is in neither git nor DVC cache")
    return Comparison(artifact, "differs", amount(artifact.path, old, new))


def md5(content: bytes) -> str:
    """The hash that dvc.lock has of a file."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def amount(path: str, old: bytes, new: bytes) -> str:
    """By how much a file differs, in the terms of its kind."""
    kinds = {".json": json_amount, ".csv": csv_amount, ".png": png_amount, ".npz": npz_amount, ".pt": weights_amount}
    try:
        return kinds.get(Path(path).suffix, text_amount)(old, new)
    except (ValueError, OSError):
        return f"{len(old):,} → {len(new):,} bytes"


def json_amount(old: bytes, new: bytes) -> str:
    """The old and the new loss, and how many other entries differ."""
    before, after = json.loads(old), json.loads(new)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if not changed:
        return "the same entries, in other bytes"
    changed.sort(key=lambda name: not name.endswith("loss"))
    first = changed[0]
    a, b = before.get(first), after.get(first)
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    text = f"{first} {a:.4f} → {b:.4f} ({b - a:+.1g})" if numbers else f"{first} {a} → {b}"
    return text + (f", and {len(changed) - 1} more of {len(before | after)} entries" if changed[1:] else "")


def csv_amount(old: bytes, new: bytes) -> str:
    """The largest absolute difference between two tables."""
    import pandas as pd

    before, after = pd.read_csv(io.BytesIO(old)), pd.read_csv(io.BytesIO(new))
    if list(before.columns) != list(after.columns) or len(before) != len(after):
        return f"{len(before):,} rows of {', '.join(before)} → {len(after):,} rows of {', '.join(after)}"
    numbers = before.select_dtypes("number").columns.intersection(after.select_dtypes("number").columns)
    texts = [name for name in before if name not in numbers and not before[name].equals(after[name])]
    if texts:
        return f"other entries in {', '.join(texts)}"
    largest = (before[numbers] - after[numbers]).abs().max()
    return f"by at most {largest.max():.2g} (in {largest.idxmax()})"


def png_amount(old: bytes, new: bytes) -> str:
    """The share of differing pixels."""
    import numpy as np
    from PIL import Image

    before, after = (np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(int) for content in (old, new))
    if before.shape != after.shape:
        return f"{before.shape[1]} × {before.shape[0]} → {after.shape[1]} × {after.shape[0]} pixels"
    difference = np.abs(before - after).max(axis=2)
    if not difference.any():
        return "the same pixels, written in other bytes"
    return f"in {(difference > 0).mean():.2%} of the pixels, by at most {difference.max()} of 255"


def npz_amount(old: bytes, new: bytes) -> str:
    """The largest absolute difference between two files of arrays."""
    import numpy as np

    return _arrays_amount(*(dict(np.load(io.BytesIO(content))) for content in (old, new)))


def weights_amount(old: bytes, new: bytes) -> str:
    """The largest absolute difference between two models."""
    import torch

    def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, torch.Tensor):
            yield name, value.numpy()
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                yield from tensors(entry, f"{name}.{key}".lstrip("."))

    return _arrays_amount(
        *(dict(tensors(torch.load(io.BytesIO(content), weights_only=True))) for content in (old, new))
    )


def _arrays_amount(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if {name: array.shape for name, array in before.items()} != {name: array.shape for name, array in after.items()}:
        return "arrays of other names or sizes"
    largest = {name: abs(before[name].astype(float) - after[name].astype(float)).max(initial=0) for name in before}
    name = max(largest, key=largest.get)
    return f"by at most {largest[name]:.2g} (in {name})" if largest[name] > 0 else "the same arrays, in other bytes"


def text_amount(old: bytes, new: bytes) -> str:
    """The number of differing lines."""
    before, after = old.decode().splitlines(), new.decode().splitlines()
    return f"in {sum(a != b for a, b in zip_longest(before, after))} of {max(len(before), len(after)):,} lines"


# The words


def is_reproduced(comparisons: Iterable[Comparison]) -> bool:
    return all(one.result in {"equal", "expected"} for one in comparisons)


def row(comparison: Comparison) -> tuple[str, str, str]:
    """A comparison for the table."""
    (stage, path, _), result, note = comparison
    word = "expected to differ" if result == "expected" else result
    return stage, path, f"{word}: {note}" if note else word


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Columns of text, as wide as their widest entry."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows
    )


def summary(comparisons: Iterable[Comparison], recorded: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The count of each result; where some differ, the circumstances of both runs."""
    comparisons = list(comparisons)
    results = [one.result for one in comparisons]
    counts = {result: results.count(result) for result in ("equal", "expected", "differs", "missing")}
    words = {"equal": "equal", "expected": "different as expected", "differs": "different", "missing": "missing"}
    counted = ", ".join(f"{count} {words[result]}" for result, count in counts.items() if count)
    if is_reproduced(comparisons):
        return f"The committed run is reproduced: {counted}."

    rows = [
        (name, str(recorded.get(name, "not recorded")), str(here.get(name, "not recorded"))) for name in CIRCUMSTANCES
    ]
    others = [name for name, before, now in rows if before != now]
    if "not recorded" in {before for _, before, _ in rows}:
        reason = f"{RECORD} does not record all circumstances of the committed run, so they may be the reason."
    elif others:
        reason = (
            f"The reason may be another {', '.join(others)}: it changes the last bits of a sum, and training carries "
            "them on. What counts then is by how much the losses differ."
        )
    else:
        reason = "The circumstances are those of the committed run, so the reason is another."
    return f"{counted}.\n\n{table([('', 'committed run', 'here'), *rows])}\n\n{reason}"


def say(message: str) -> None:
    print(f"verify: {message}", file=sys.stderr, flush=True)


def git(*arguments: str, check: bool = True) -> bytes:
    """What git prints in the repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, check=False)
    except FileNotFoundError as error:
        raise CannotVerifyError("git is not installed") from error
    if check and done.returncode != 0:
        lines = done.stderr.decode(errors="replace").splitlines()
        reason = next((line for line in lines if line.startswith("fatal:")), "it failed")
        raise CannotVerifyError(f"git {arguments[0]}: {reason.removeprefix('fatal: ')}")
    return done.stdout


if __name__ == "__main__":
    main()
