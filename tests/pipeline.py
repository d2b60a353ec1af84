"""The pipeline as a user has it: a clone of the working tree, small parameters, commands in a clean environment.

The clone has a DVC cache, an MLflow store and a git history of its own, so nothing in it reaches the repository.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parent.parent

# The whole pipeline in under a minute: the embedded digits, a small model, few draws.
TINY = {
    "data.dataset": "digits",
    "model.hidden_dim": 16,
    "train.epochs": 1,
    "train.accelerator": "cpu",
    "evaluate.draws": 2,
    "evaluate.quadrature_step": 0.5,
    "evaluate.importance_samples": 4,
    "evaluate.quality_images": 100,
    "samples.rows": 2,
    "samples.cols": 3,
    "grid.size": 3,
}

# What the caller's shell may carry and a clone must not see: another workspace, store, experiment, git folder.
FOREIGN = ("DVC_", "MLFLOW_", "GIT_")


def clone_working_tree(target: Path) -> Path:
    """A git repository at ``target`` whose one commit is the working tree: what git tracks or does not ignore."""
    target.mkdir(parents=True)
    listing = run(REPOSITORY, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    for name in filter(None, listing.split("\0")):
        source, copy = REPOSITORY / name, target / name
        if source.is_file():  # a deleted file stays in git's list until the deletion is staged
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    run(target, "git", "init", "--quiet", "--initial-branch=main")
    for name, value in {"user.name": "A Tester", "user.email": "tester@example.org", "commit.gpgsign": "false"}.items():
        run(target, "git", "config", name, value)
    return commit(target, "The working tree")


def commit(clone: Path, message: str) -> Path:
    """Commit all that git does not ignore."""
    run(clone, "git", "add", "--all")
    run(clone, "git", "commit", "--quiet", "--no-verify", "--message", message)
    return clone


def set_params(clone: Path, values: Mapping[str, Any]) -> None:
    """Change entries of params.yaml, named as ``train.epochs`` is; its comments stay."""
    yaml, path = YAML(), clone / "params.yaml"
    content = yaml.load(path)
    for name, value in values.items():
        section, _, entry = name.partition(".")
        assert entry in content[section], f"params.yaml has no {name}"
        content[section][entry] = value
    yaml.dump(content, path)


def environment(clone: Path, **extra: str) -> dict[str, str]:
    """The caller's environment with this interpreter first on the PATH and without what names another workspace."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["DVC_SITE_CACHE_DIR"] = str(clone / ".dvc" / "tmp" / "site-cache")  # not in /var, where it would stay
    mirror = env.get("MNIST_MIRROR")
    if mirror and "://" not in mirror:  # relative means: to the repository, not to the clone
        env["MNIST_MIRROR"] = str(REPOSITORY / mirror)
    return env | extra


def run(
    clone: Path, *argv: str | Path, env: Mapping[str, str] | None = None, check: bool = True, timeout: float = 1200
) -> subprocess.CompletedProcess[str]:
    """Run a command in ``clone`` with ``env`` added to its clean environment; stdout and stderr are text.

    With ``check``, a failing command fails the test and shows all that it printed.
    """
    done = subprocess.run(
        [str(part) for part in argv],
        cwd=clone,
        env=environment(clone, **(env or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"{' '.join(map(str, argv))} ended with status {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


def stages_run(output: str) -> list[str]:
    """The stages that ``dvc repro`` or ``dvc exp run`` says it ran, in order; skipped and cached ones are not here."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]
