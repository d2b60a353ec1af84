"""Which code made a result: git's commit, and whether the files differed from it."""

import subprocess
from pathlib import Path

# What the pipeline itself writes, and git keeps, does not make the code another.
OUTPUTS = (":!metrics", ":!plots", ":!dvc.lock")


def git_state(folder: Path) -> dict[str, str]:
    """``git_commit`` (full hash) and ``git_dirty`` (true or false) of a checkout; "unknown" outside of one."""
    try:
        return {
            "git_commit": _git(folder, "rev-parse", "HEAD").strip(),
            "git_dirty": str(bool(_git(folder, "status", "--porcelain", "--", ".", *OUTPUTS).strip())).lower(),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": "unknown", "git_dirty": "unknown"}


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout
