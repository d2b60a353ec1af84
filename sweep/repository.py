"""The repository that a sweep starts from: its commit, where clones come from, and what has been run already."""

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from mnist_vae.errors import UserError
from mnist_vae.tracking.store import DATABASE, Store
from sweep.slot import Sweep, git, reference

IDENTITY = ("user.name", "user.email")
METRICS = "metrics/evaluate.json"
SQLITE = "sqlite:///"
ATTEMPTS, PAUSE_S = 4, 5  # to fetch experiments
HERE = "."  # in place of a git remote: this folder, for workers that see it under the same path


class Repository:
    """A git repository with DVC in it, at its last commit.

    Raises:
        UserError: git says no, or files differ from the last commit.
    """

    def __init__(self, root: Path, remote: str) -> None:
        self.root, self.remote = root, remote
        self.commit = self._git("rev-parse", "HEAD").strip()
        if changed := self._git("status", "--porcelain", "--untracked-files=no").splitlines():
            raise UserError(
                f"{changed[0][3:]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''} differs from the last "
                "commit, which is what every experiment starts from: `git commit` or `git stash` first"
            )

    def sweep(self) -> Sweep:
        """What every worker must know.

        Raises:
            UserError: the workers' results would stay where they are, or the workers could not get the commit.
        """
        identity = {entry: self._git("config", "--default", "sweep", entry).strip() for entry in IDENTITY}
        if self.remote == HERE:
            return Sweep(self.commit, str(self.root), self._cache(), "", self._here(), identity)
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        source = self._git("remote", "get-url", self.remote).strip()
        if not uri:
            raise UserError(
                "the runs would stay on the workers: name the MLflow server that they reach by MLFLOW_TRACKING_URI"
            )
        if is_relative(uri):
            raise UserError(
                f"MLFLOW_TRACKING_URI is {uri}, a relative path, at which each worker would make a store of its own: "
                "name a server, or an absolute path that all workers share"
            )
        name, url = self._dvc_remote()
        if not name:
            raise UserError(
                "the models would stay on the workers: name a DVC remote that they reach, `dvc remote add --default "
                "NAME URL`, and commit and push .dvc/config"
            )
        if url and is_relative(url) and not url.startswith("~"):
            raise UserError(
                f"the DVC remote {name} is at {url}, a relative path, at which each worker would make a folder of its "
                f"own: `dvc remote modify {name} url` with a URL, or an absolute path that all workers share, and "
                "commit and push .dvc/config"
            )
        if (self.root / source).is_dir():  # a folder, which may be named from here
            source = str((self.root / source).resolve())
        self._git("fetch", "--quiet", self.remote)
        if not self._git("for-each-ref", "--contains", self.commit, f"refs/remotes/{self.remote}").strip():
            raise UserError(f"the remote {self.remote} does not have the last commit: `git push {self.remote}` first")
        return Sweep(self.commit, source, "", "", {"MLFLOW_TRACKING_URI": uri}, identity)

    def fetch(self, names: Sequence[str] = ("*",)) -> None:
        """Get experiments that workers have pushed: parameters and metrics, which are in git; no data.

        Raises:
            UserError: it failed ATTEMPTS times; while experiments run, a network may fail once.
        """
        if not names or self.remote == HERE:
            return
        references = [reference(self.commit, name) for name in names]
        for left in reversed(range(ATTEMPTS)):
            try:
                self._git("fetch", "--quiet", self.remote, *(f"+{one}:{one}" for one in references))
                return
            except UserError:
                if not left:
                    raise
                time.sleep(PAUSE_S)

    def existing(self) -> set[str]:
        """The names of the experiments on the commit."""
        self.fetch()
        folder = reference(self.commit, "")
        return {one.removeprefix(folder) for one in self._git("for-each-ref", "--format=%(refname)", folder).split()}

    def metrics(self, name: str) -> dict[str, Any]:
        """What an experiment's evaluation measured."""
        found: dict[str, Any] = json.loads(self._git("show", f"{reference(self.commit, name)}:{METRICS}"))
        return found

    def _here(self) -> dict[str, str]:
        """The MLflow store of this folder, and its MNIST, as environment variables for clones elsewhere."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            Store(self.root)  # made where there is none: a clone's process would have artifacts put beside the clone
            uri = f"{SQLITE}{self.root / DATABASE}"
        elif uri.startswith(SQLITE):
            uri = f"{SQLITE}{self.root / uri.removeprefix(SQLITE)}"
        elif is_relative(uri):
            uri = str(self.root / uri.removeprefix("file:"))
        mirror = os.environ.get("MNIST_MIRROR")
        if mirror and "://" not in mirror:
            mirror = str(self.root / mirror)
        return {"MLFLOW_TRACKING_URI": uri, **({"MNIST_MIRROR": mirror} if mirror else {})}

    def _cache(self) -> str:
        """The folder of DVC's cache."""
        from dvc.repo import Repo

        with Repo(str(self.root)) as repo:
            return str(repo.cache.local_cache_dir)

    def _dvc_remote(self) -> tuple[str, str]:
        """The name and the URL of the default remote, each empty where the commit does not have it."""
        settings = ConfigParser(interpolation=None, strict=False)
        settings.read_string(self._git("show", "HEAD:.dvc/config"))
        name = settings.get("core", "remote", fallback="")
        return name, settings.get(f"'remote \"{name}\"'", "url", fallback="")

    def _git(self, *arguments: str) -> str:
        try:
            return git(*arguments, folder=self.root)
        except FileNotFoundError as error:
            raise UserError("git is not installed") from error
        except subprocess.CalledProcessError as error:
            said = " ".join(str(error.stderr).split()) or f"it failed with status {error.returncode}"
            raise UserError(redacted(f"git {arguments[0]}: {said}")) from error


def is_relative(address: str) -> bool:
    """Whether an address is a path that means another place in each folder."""
    path = address.removeprefix(SQLITE).removeprefix("file:")
    return "://" not in path and not path.startswith("/") and not address.startswith("databricks")


def redacted(text: str) -> str:
    """A text without the passwords of the addresses in it."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)
