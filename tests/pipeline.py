"""The pipeline as a user has it: a clone of the working tree, small parameters, commands in a clean environment.

The clone has a DVC cache, an MLflow store and a git history of its own, so nothing in it reaches the repository.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tools.clone import clone, environment, git

__all__ = ["TINY", "clone_working_tree", "commit", "environment", "introduce", "run", "set_params", "stages_run"]


# The whole pipeline in under a minute: the embedded digits, a small model, few draws.
TINY = {
    "data.dataset": "digits",
    "model.hidden_dims": [16],
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


def clone_working_tree(target: Path) -> Path:
    """A clone at ``target`` whose last commit is the working tree: what git tracks or does not ignore."""
    target.parent.mkdir(parents=True, exist_ok=True)
    clone(target, uncommitted=True)
    git("checkout", "--quiet", "-B", "main", folder=target)
    for name, value in {"user.name": "A Tester", "user.email": "tester@example.org", "commit.gpgsign": "false"}.items():
        git("config", name, value, folder=target)
    return commit(target, "The working tree")


def commit(folder: Path, message: str) -> Path:
    """Commit all that git does not ignore, also where nothing has changed."""
    git("add", "--all", folder=folder)
    git("commit", "--quiet", "--no-verify", "--allow-empty", "--message", message, folder=folder)
    return folder


def set_params(folder: Path, values: Mapping[str, Any]) -> None:
    """Change entries of params.yaml, named as ``train.epochs`` is; its comments stay."""
    yaml, path = YAML(), folder / "params.yaml"
    content = yaml.load(path)
    for name, value in values.items():
        section, _, entry = name.partition(".")
        assert entry in content[section], f"params.yaml has no {name}"
        content[section][entry] = value
    yaml.dump(content, path)


def run(
    folder: Path, *argv: str | Path, env: Mapping[str, str] | None = None, check: bool = True, timeout: float = 1200
) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` with ``env`` added to its clean environment; stdout and stderr are text.

    With ``check``, a failing command fails the test and shows all that it printed.
    """
    done = subprocess.run(
        [str(part) for part in argv],
        cwd=folder,
        env=environment(folder, **(env or {})),
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


def introduce(clone: Path, who: dict[str, str]) -> None:
    """Say who one is at the DVC remote `storage`, in the settings that git does not keep."""
    for name, value in who.items():
        run(clone, "dvc", "remote", "modify", "--local", "storage", name, value)
