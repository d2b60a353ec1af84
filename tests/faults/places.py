"""Folders with odd names, git in odd states, users with odd settings."""

import shutil
from collections.abc import Callable
from functools import partial

from tests.faults.lab import Lab


def named(name: str) -> Callable[[Lab], None]:
    """The project lies in a folder of this name."""
    return partial(_named, name=name)


def _named(lab: Lab, name: str) -> None:
    lab.begin("downloaded", lab.folder / name / "mnist-vae")
    (lab.clone.parent / "elsewhere").mkdir()
    lab.repro()
    assert {path.name for path in lab.clone.parent.iterdir()} == {"mnist-vae", "elsewhere"}
    assert not list(lab.folder.glob("*.db*"))


def without_git(lab: Lab) -> None:
    lab.begin("downloaded")
    shutil.rmtree(lab.clone / ".git")
    lab.fail()
    remedy = lab.remedies()
    assert "git init" in remedy
    lab.run("git", "-c", "init.defaultBranch=main", "init", "--quiet").succeeded()
    for name, value in {"user.name": "A Tester", "user.email": "tester@example.org"}.items():
        lab.run("git", "config", name, value)
    (lab.clone / ".git/info/exclude").write_text("/src/sitecustomize.py\n")
    lab.run("git", "add", ".").succeeded()
    lab.run("git", "commit", "--quiet", "--message", "start").succeeded()


def without_identity(lab: Lab) -> None:
    lab.begin("downloaded")
    for name in ("user.name", "user.email"):
        lab.run("git", "config", "--unset", name).succeeded()
    lab.env |= {"HOME": str(lab.folder), "GIT_CONFIG_NOSYSTEM": "1", "EMAIL": ""}


def detached(lab: Lab) -> None:
    lab.begin("downloaded")
    lab.run("git", "checkout", "--quiet", "--detach").succeeded()


def shallow(lab: Lab) -> None:
    lab.begin("downloaded")
    origin = lab.clone.rename(lab.folder / "origin")
    lab.folder.joinpath("mnist-vae").mkdir()
    lab.run("git", "clone", "--quiet", "--depth", "1", origin.as_uri(), str(lab.clone)).succeeded()
    shutil.copy(origin / "params.yaml", lab.clone)
    shutil.copy(origin / "src/sitecustomize.py", lab.clone / "src")
    (lab.clone / ".git/info/exclude").write_text("/src/sitecustomize.py\n")


def with_env(**env: str) -> Callable[[Lab], None]:
    """Variables of the environment."""
    return partial(_with_env, env=env)


def _with_env(lab: Lab, env: dict[str, str]) -> None:
    lab.begin("downloaded")
    lab.env |= env
