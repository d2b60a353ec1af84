"""A stage's outputs as DVC recorded them: found again after a failure, and removed where they are damaged."""

import configparser
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mnist_vae.errors import UserError
from mnist_vae.files import SCRATCH, atomic_write, flush_to_disk, make_folder, writable, write_bytes
from stages import WORKSPACE

OBJECT = re.compile(r"[0-9a-f]{30}(\.dir)?")  # the name of a file in DVC's cache; others are still being written

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """An output of a stage, as dvc.lock names it: a file, or a folder of files, whose hash ends in ``.dir``."""

    path: Path
    md5: str

    def is_there(self) -> bool:
        """Whether the file, or the folder, is what DVC recorded."""
        return self.path.exists() and hash_of(self.path) == self.md5

    def objects(self) -> list[str]:
        """The hashes of what DVC's cache has of it: of the file, or of a folder's listing and of each file in it."""
        return [self.md5, *(file.md5 for file in self.files())] if self.is_folder else [self.md5]

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.md5.endswith(".dir")

    def files(self) -> list["Output"]:
        """The file itself, or those of the folder; none where the folder's listing is damaged or nowhere."""
        if not self.is_folder:
            return [self]
        listing = _cached(self.md5)
        if listing is None or not listing.is_file() or not is_whole(listing):
            return []
        return [Output(self.path / file["relpath"], file["md5"]) for file in json.loads(listing.read_bytes())]

    def put(self, target: Path) -> None:
        """Write it to ``target``, from DVC's cache or from git's last commit.

        Raises:
            FileNotFoundError: neither has it whole.
            UserError: it cannot be written.
        """
        if not (files := self.files()):
            raise FileNotFoundError(self.path)
        for file in files:
            cached = _cached(file.md5)
            with atomic_write(target / file.path.relative_to(self.path)) as scratch:
                if cached is not None and cached.is_file() and is_whole(cached):
                    shutil.copyfile(cached, scratch)
                elif (content := _from_git(file.path)) is not None and md5(content) == file.md5:
                    scratch.write_bytes(content)
                else:
                    raise FileNotFoundError(file.path)


def md5(content: bytes) -> str:
    """The hash by which DVC knows a file of this content."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def hash_of(path: Path) -> str:
    """The hash by which DVC knows a file or a folder, read block by block."""
    if path.is_dir():
        return md5(listing_of(path)) + ".dir"
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def listing_of(folder: Path) -> bytes:
    """What DVC's cache has for a folder: the files in it with their hashes, as DVC writes them, byte for byte."""
    files = sorted((path.relative_to(folder).parts, path) for path in folder.rglob("*") if path.is_file())
    entries = [{"md5": hash_of(path), "relpath": "/".join(parts)} for parts, path in files]
    return json.dumps(entries, sort_keys=True).encode()


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
        remove(path)
    try:
        for output in missing:
            remove(output.path)
            output.put(output.path)
    except (OSError, UserError):  # it is nowhere to be found, or the disk is full
        for output in outputs:
            remove(output.path)


def remove_damaged(stage: str) -> list[Path]:
    """Remove inputs of a stage that are not what DVC recorded, and what its cache has in their place.

    DVC trusts its cache unread. Without the damaged object, the next `dvc repro` makes the file again.
    """
    inputs, damaged = declared(stage, "deps"), []
    for output in locked():
        if output.path in inputs and output.path.exists() and not output.is_there():
            objects = [found for found in map(_cached, output.objects()) if found is not None and found.is_file()]
            broken = [found for found in objects if not is_whole(found)]
            for found in broken:
                found.unlink()
            if broken:
                remove(output.path)
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
            with tempfile.TemporaryDirectory(dir=scratch_folder, prefix=f"{SCRATCH}{os.getpid()}-") as folder:
                scratch = Path(folder, "object")
                for file in path.rglob("*") if path.is_dir() else [path]:
                    if file.is_file():
                        _put_object(cache, hash_of(file), scratch, partial(shutil.copyfile, file))
                if path.is_dir():  # last: where a listing is, there are the files that it names
                    listing = listing_of(path)
                    _put_object(
                        cache,
                        f"{md5(listing)}.dir",
                        scratch,
                        partial(Path.write_bytes, data=listing),
                    )


def _put_object(cache: Path, name: str, scratch: Path, write: Callable[[Path], Any]) -> None:
    """Have an object of this name in the cache, flushed to the disk: written to ``scratch`` unless it is there."""
    target = cache / name[:2] / name[2:]
    if target.is_file() and is_whole(target):
        return
    write(scratch)
    scratch.chmod(0o444)  # as DVC protects its objects
    flush_to_disk(scratch)
    make_folder(target.parent)
    scratch.replace(target)
    flush_to_disk(target.parent)


def _is_cache_elsewhere() -> bool:
    """Whether DVC's settings, of this project, this person or this machine, name another folder for its cache."""
    from dvc.dirs import global_config_dir, system_config_dir

    own = (WORKSPACE / ".dvc/config", WORKSPACE / ".dvc/config.local")
    others = (Path(folder(), "config") for folder in (global_config_dir, system_config_dir))
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read([*own, *others], encoding="utf-8")
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
    return hash_of(cached) == cached.parent.name + cached.name.removesuffix(".dir")


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
