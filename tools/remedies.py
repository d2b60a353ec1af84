"""What may keep DVC from running, each with its remedy in words.

python -m tools.remedies    run by `make run` when `dvc repro` fails; says nothing where it finds nothing
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


def remedies() -> Iterator[str]:
    """One line for each thing that is wrong with this folder."""
    if shutil.which("git") is None:
        yield "git is not installed, and DVC needs it"
    elif subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], capture_output=True, check=False).returncode:
        yield "this folder is no git repository, and DVC needs one: `git init && git add . && git commit -m start`"
    if is_from_elsewhere(Path(".venv/bin/dvc")):
        yield "this folder was moved, and .venv with it: `make clean setup` makes it anew"
    rwlock = Path(".dvc/tmp/rwlock")
    if rwlock.is_file() and not is_json(rwlock.read_bytes()):
        yield f"{rwlock}, DVC's note of who reads and writes, is damaged: remove it (`rm {rwlock}`)"
    elif rwlock.is_file() and (holders := sorted(set(pids(json.loads(rwlock.read_text()))))):
        numbers = ", ".join(map(str, holders))
        yield f"{rwlock} names the processes {numbers}; if none of them is a dvc any more, remove it (`rm {rwlock}`)"
    lock = Path("dvc.lock")
    if lock.is_file() and not is_lock(lock):
        yield (
            "dvc.lock is damaged: `git checkout -- dvc.lock` brings back the committed one, "
            "and `dvc repro` takes from its cache what has run since"
        )


def is_from_elsewhere(script: Path) -> bool:
    """Whether the Python that a script names in its first line is not there."""
    if not script.is_file():
        return False
    interpreter = script.read_bytes().partition(b"\n")[0].removeprefix(b"#!").decode(errors="replace").strip()
    return not Path(interpreter).exists()


def is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


def pids(entry: object) -> Iterator[int]:
    """Every process number in an rwlock."""
    if isinstance(entry, dict):
        if isinstance(entry.get("pid"), int):
            yield entry["pid"]
        for value in entry.values():
            yield from pids(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from pids(value)


def is_lock(path: Path) -> bool:
    """Whether a dvc.lock can be read and names stages."""
    try:
        content = YAML(typ="safe", pure=True).load(path)
    except (YAMLError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and isinstance(content.get("stages"), dict)


def main() -> None:
    for remedy in remedies():
        print(f"make run: {remedy}", file=sys.stderr)


if __name__ == "__main__":
    main()
