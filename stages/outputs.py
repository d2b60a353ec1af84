"""A stage's outputs as DVC recorded them: found again after a failure, and removed where they are damaged."""

import configparser
import hashlib
import logging
import os
import re
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mnist_vae.errors import UserError
from mnist_vae.files import SCRATCH, flush_to_disk, make_folder, writable, write_bytes
from stages import WORKSPACE

OBJECT = re.compile(r"[0-9a-f]{30}(\.dir)?")  # the name of a file in DVC's cache; others are still being written

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """An output of a stage, as dvc.lock names it."""

    path: Path
    md5: str

    def is_there(self) -> bool:
        """Whether the file is what DVC recorded."""
        return self.path.is_file() and md5(self.path.read_bytes()) == self.md5

    def recorded(self) -> bytes | None:
        """Its content, from DVC's cache or from git's last commit; None where neither has it."""
        for content in (_from_cache(self.md5), _from_git(self.path)):
            if content is not None and md5(content) == self.md5:
                return content
        return None


def md5(content: bytes) -> str:
    """The hash by which DVC knows a file."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def locked(*stages: str) -> list[Output]:
    """The outputs of some stages, or of all, in dvc.lock; none where there is no good dvc.lock."""
    try:
        lock = YAML(typ="safe", pure=True).load(Path("dvc.lock"))["stages"]
        found = [out for stage in stages or lock for out in lock.get(stage, {}).get("outs", [])]
        return [Output(Path(out["path"]), out["md5"]) for out in found]
    except (OSError, YAMLError, LookupError, TypeError, AttributeError):
        return []


def declared(stage: str, *entries: str) -> set[Path]:
    """The files that dvc.yaml has under some entries of a stage."""
    pipeline: Any = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))
    found = [one for entry in entries for one in pipeline["stages"][stage].get(entry, [])]
    return {Path(next(iter(one)) if isinstance(one, dict) else one) for one in found}


def restore(stage: str) -> None:
    """Put back all outputs of the last success, which DVC removed before the stage began; all of them or none."""
    outputs = locked(stage)
    missing = [output for output in outputs if not output.is_there()]
    there = {output.path for output in outputs} - {output.path for output in missing}
    for path in declared(stage, "outs", "metrics", "plots") - there:
        path.unlink(missing_ok=True)
    try:
        for output in missing:
            content = output.recorded()
            if content is None:
                raise FileNotFoundError(output.path)
            write_bytes(output.path, content)
    except (OSError, UserError):  # it is nowhere to be found, or the disk is full
        for output in outputs:
            output.path.unlink(missing_ok=True)


def remove_damaged(stage: str) -> list[Path]:
    """Remove inputs of a stage that are not what DVC recorded, and what its cache has in their place.

    DVC trusts its cache unread. Without the damaged object, the next `dvc repro` makes the file again.
    """
    inputs, damaged = declared(stage, "deps"), []
    for output in locked():
        if output.path in inputs and output.path.is_file() and not output.is_there():
            cached = _cached(output.md5)
            if cached is not None and cached.is_file() and not is_whole(cached):
                cached.unlink()
                output.path.unlink()
                damaged.append(output.path)
    return damaged


def put_into_cache(stage: str) -> None:
    """Put a stage's outputs into DVC's cache, flushed to the disk; DVC finds them there and copies nothing.

    DVC does not wait for the disk. After a power cut its own copies may be empty, and it would put those in place of
    the whole outputs. Where the cache is elsewhere, or full, this is left to DVC.
    """
    cache, scratch_folder = WORKSPACE / ".dvc/cache/files/md5", WORKSPACE / ".dvc/tmp"
    if "DVC_STAGE" not in os.environ or not scratch_folder.is_dir() or _is_cache_elsewhere():
        return
    with suppress(OSError):
        for path in declared(stage, "outs", "metrics", "plots"):
            content = path.read_bytes()
            name = md5(content)
            target = cache / name[:2] / name[2:]
            if target.is_file() and is_whole(target):
                continue
            with tempfile.TemporaryDirectory(dir=scratch_folder, prefix=f"{SCRATCH}{os.getpid()}-") as folder:
                scratch = Path(folder, name)
                scratch.write_bytes(content)
                scratch.chmod(0o444)  # as DVC protects its objects
                flush_to_disk(scratch)
                make_folder(target.parent)
                scratch.replace(target)
            flush_to_disk(target.parent)


def _is_cache_elsewhere() -> bool:
    """Whether the project's settings name another folder for DVC's cache."""
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read([WORKSPACE / ".dvc/config", WORKSPACE / ".dvc/config.local"], encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return True
    return settings.has_option("cache", "dir")


def check_cache() -> None:
    """Have the disk hold what DVC has put into its cache since the last check, and remove objects that are damaged.

    DVC copies small outputs into its cache without waiting for the disk, and never reads an object to see whether a
    power cut left it whole. Each object is read once.
    """
    cache, marker = WORKSPACE / ".dvc/cache/files/md5", WORKSPACE / ".dvc/tmp/cache-checked"
    since, now = marker.stat().st_mtime if marker.is_file() else 0.0, time.time()
    for found in cache.glob("??/*"):
        with writable(found), suppress(FileNotFoundError):  # another process may have removed it
            if not OBJECT.fullmatch(found.name) or found.stat().st_ctime < since:
                continue
            flush_to_disk(found)
            if not is_whole(found):
                log.warning("%s was damaged on the disk; it is removed and will be made again", found)
                found.unlink()
    if cache.is_dir():
        write_bytes(marker, b"")
        os.utime(marker, (now, now))


def is_whole(cached: Path) -> bool:
    """Whether an object of DVC's cache has the hash that its name says."""
    with cached.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return digest == cached.parent.name + cached.name.removesuffix(".dir")


def _from_cache(md5_of_file: str) -> bytes | None:
    cached = _cached(md5_of_file)
    return cached.read_bytes() if cached is not None and cached.is_file() else None


def _from_git(path: Path) -> bytes | None:
    """The file in git's last commit; None where there is no git, no commit, or no such file."""
    try:
        return subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _cached(md5_of_file: str) -> Path | None:
    """Where DVC's cache has an object, if it has it; None where there is no DVC."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return Path(repo.cache.local.oid_to_path(md5_of_file))
    except DvcException:
        return None
