"""A fresh clone of the project and a clean environment to run it in: for make verify, the benchmarks and the tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("DVC_", "MLFLOW_", "GIT_")  # variables that name another workspace, store or repository


class GitError(Exception):
    """git failed; the message says why, in one line."""


def clone(target: Path, *, uncommitted: bool = False) -> Path:
    """Clone HEAD to ``target``, without a way back to this repository.

    With ``uncommitted`` its files are those of the working tree: all that git tracks or does not ignore.
    """
    git("clone", "--quiet", str(ROOT), str(target))
    git("remote", "remove", "origin", folder=target)
    if uncommitted:
        git("rm", "-r", "--quiet", ".", folder=target)
        for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
            source, copy = ROOT / name, target / name
            if source.is_file():  # a deleted file stays in git's list until the deletion is staged
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, copy)
    return target


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """This process's environment for a command in ``folder``: this interpreter first, nobody's DVC or MLflow settings.

    A relative MNIST_MIRROR names a folder of this repository, not of the clone.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    mirror = env.get("MNIST_MIRROR")
    if mirror and "://" not in mirror:
        env["MNIST_MIRROR"] = str(ROOT / mirror)
    scratch = folder / ".dvc" / "tmp"
    return {
        **env,
        "DVC_SITE_CACHE_DIR": str(scratch / "site-cache"),  # by default in /var, where it would stay
        "DVC_GLOBAL_CONFIG_DIR": str(scratch / "no-config"),  # which may name a cache or a remote
        "DVC_SYSTEM_CONFIG_DIR": str(scratch / "no-config"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **extra,
    }


def git(*arguments: str, folder: Path = ROOT) -> str:
    """What git prints in ``folder``.

    Raises:
        GitError: what git says about its failure, or that there is no git.
    """
    command = ["git", *arguments]
    try:
        return subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError as error:
        raise GitError("git is not installed") from error
    except subprocess.CalledProcessError as error:
        raise GitError(f"git {arguments[0]}: {' '.join(error.stderr.split()) or 'it failed'}") from error
