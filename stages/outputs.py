"""A stage's outputs as DVC recorded them: found again after a failure, and removed where they are damaged."""

import hashlib
import logging
import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mnist_vae.files import flush_to_disk, write_bytes
from stages import WORKSPACE

log = logging.getLogger(__name__)


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


def check_cache() -> None:
    """Have the disk hold what DVC has put into its cache since the last check, and remove objects that are damaged.

    DVC copies small outputs into its cache without waiting for the disk, and never reads an object to see whether a
    power cut left it whole. Each object is read once.
    """
    cache, marker = WORKSPACE / ".dvc/cache/files/md5", WORKSPACE / ".dvc/tmp/cache-checked"
    since, now = marker.stat().st_mtime if marker.is_file() else 0.0, time.time()
    new = [found for found in cache.glob("??/*") if found.stat().st_ctime >= since and found.suffix != ".unpacked"]
    for found in new:
        flush_to_disk(found)
        if not is_whole(found):
            log.warning("%s was damaged on the disk; it is removed from DVC's cache and will be made again", found)
            found.unlink()
    if new:
        write_bytes(marker, b"")
        os.utime(marker, (now, now))


def is_whole(cached: Path) -> bool:
    """Whether an object of DVC's cache has the hash that its name says."""
    with cached.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return digest == cached.parent.name + cached.name.removesuffix(".dir")
