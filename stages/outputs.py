"""A stage's outputs as DVC recorded them: found again after a failure, and removed where they are damaged."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML, YAMLError

from mnist_vae.files import write_bytes


class Output(NamedTuple):
    """An output of a stage, as dvc.lock names it."""

    path: Path
    md5: str

    def recorded(self) -> bytes | None:
        """Its content, from DVC's cache or from git's last commit; None where neither has it."""
        found = _cached(self.md5)
        for content in (
            found.read_bytes() if found.is_file() else b"",
            subprocess.run(["git", "show", f"HEAD:./{self.path}"], capture_output=True, check=False).stdout,
        ):
            if md5(content) == self.md5:
                return content
        return None


def md5(content: bytes) -> str:
    """The hash by which DVC knows a file."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def locked(stage: str, entry: str) -> list[Output]:
    """The ``outs`` or ``deps`` of a stage in dvc.lock that are single files; none where there is no good dvc.lock."""
    try:
        lock = YAML(typ="safe", pure=True).load(Path("dvc.lock"))
        found = lock["stages"][stage].get(entry, [])
        return [Output(Path(one["path"]), one["md5"]) for one in found if not one["md5"].endswith(".dir")]
    except (OSError, YAMLError, LookupError, TypeError, AttributeError):
        return []


def restore(stage: str) -> None:
    """Put back all outputs of the last success, which DVC removed before the stage began; all of them or none."""
    outputs = locked(stage, "outs")
    contents = {output.path: output.recorded() for output in outputs}
    whole = bool(outputs) and None not in contents.values()
    for path, content in contents.items():
        if whole and content is not None:
            if not path.is_file() or path.read_bytes() != content:
                write_bytes(path, content)
        else:
            path.unlink(missing_ok=True)


def remove_damaged(stage: str) -> list[Path]:
    """Remove inputs of a stage that are not what DVC recorded, and what its cache has in their place.

    DVC trusts its cache unread. Without the damaged object, the next `dvc repro` makes the file again.
    """
    damaged = []
    for dependency in locked(stage, "deps"):
        if dependency.path.parts[0] in {"src", "stages"} or not dependency.path.is_file():
            continue
        if md5(dependency.path.read_bytes()) != dependency.md5:
            cached = _cached(dependency.md5)
            if cached.is_file() and md5(cached.read_bytes()) != dependency.md5:
                cached.unlink()
                dependency.path.unlink()
                damaged.append(dependency.path)
    return damaged


def _cached(md5_of_file: str) -> Path:
    """Where DVC's cache has an object."""
    from dvc.repo import Repo

    with Repo() as repo:
        return Path(repo.cache.local.oid_to_path(md5_of_file))


def code_of(stage: str) -> list[Path]:
    """The source files and folders that dvc.yaml says a stage's results depend on."""
    pipeline: Any = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))
    return [Path(path) for path in pipeline["stages"][stage]["deps"] if path.startswith(("src/", "stages/"))]
