"""Results that travel by a git remote and a DVC remote: what somebody has run is fetched, not run again."""

import importlib.util
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.outputs import hash_of
from tests.pipeline import commit, introduce, run, set_params, stages_run
from tests.tracking import copy_workspace
from tools.deployment import free_port, wait_for
from tools.verify import read_lock

pytestmark = [pytest.mark.slow, pytest.mark.shared]

NEEDED = ("dvc_s3", "moto")
WHO = {"access_key_id": "ada", "secret_access_key": "s3cret"}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that answers as S3 does, with an empty bucket ``results``."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs the Python packages {', '.join(missing)} (dvc[s3], moto[server])")
    folder, port = tmp_path_factory.mktemp("s3"), free_port()
    address, log = f"http://127.0.0.1:{port}", folder / "log"
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file)
    try:
        wait_for(lambda: has_answered("GET", address), server, log)
        assert has_answered("PUT", f"{address}/results")
        yield address
    finally:
        server.kill()
        server.wait()


def has_answered(method: str, address: str) -> bool:
    """Whether a server answers as it should."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module", params=["folder", "s3"])
def origin(request, finished_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict]]:
    """A git remote, and who one is at the DVC remote; the author has pushed an experiment, and another run.

    The experiment is ``larger`` (grid.size 4); with 5 the author has run the pipeline too, and gone back.
    """
    folder = tmp_path_factory.mktemp(f"by_{request.param}")
    author, git_remote, storage, who = folder / "author", folder / "origin.git", str(folder / "storage"), {}
    if request.param == "s3":
        storage, who = "s3://results/mnist-vae", WHO | {"endpointurl": request.getfixturevalue("s3")}
    copy_workspace(finished_pipeline, author)
    run(author, "dvc", "remote", "add", "--default", "storage", storage)
    commit(author, "Where results are shared")
    introduce(author, who)
    run(folder, "git", "init", "--quiet", "--bare", "--initial-branch", "main", git_remote)
    run(author, "git", "remote", "add", "origin", git_remote)
    run(author, "git", "push", "--quiet", "origin", "main")

    run(author, "dvc", "exp", "run", "--name", "larger", "--set-param", "grid.size=4")
    run(author, "dvc", "exp", "push", "origin", "larger")
    run(author, "git", "checkout", "--quiet", ".")
    set_params(author, {"grid.size": 5})
    run(author, "dvc", "repro")
    shutil.copy(author / "plots/grid.png", folder / "of 5.png")
    run(author, "git", "checkout", "--quiet", "--force", "HEAD", ".")
    run(author, "dvc", "checkout")
    run(author, sys.executable, "-m", "tools.share", env={"PYTHONPATH": "src"})
    return git_remote, who


@pytest.fixture
def colleague(origin: tuple[Path, dict], tmp_path: Path) -> Path:
    """A new clone, with nothing in DVC's cache."""
    git_remote, who = origin
    clone = tmp_path / "colleague"
    run(tmp_path, "git", "clone", "--quiet", git_remote, clone)
    introduce(clone, who)
    return clone


def assert_whole(clone: Path) -> None:
    """Every output of every stage is there, with the bytes of dvc.lock."""
    artifacts = read_lock((clone / "dvc.lock").read_bytes())
    assert len(artifacts) > 10
    for artifact in artifacts:
        assert hash_of(clone / artifact.path) == artifact.md5, artifact.path


def test_a_colleague_gets_a_whole_experiment(colleague):
    run(colleague, "dvc", "exp", "pull", "origin", "larger")
    run(colleague, "dvc", "exp", "apply", "larger")

    assert_whole(colleague)
    assert stages_run(run(colleague, "dvc", "repro").stdout) == []


def test_a_colleague_gets_all_of_a_commit_without_running_anything(colleague):
    run(colleague, "dvc", "pull")

    assert_whole(colleague)
    assert stages_run(run(colleague, "dvc", "repro").stdout) == []


def test_what_somebody_else_has_run_is_fetched_and_not_run_again(colleague, origin):
    run(colleague, "dvc", "fetch", "--run-cache")
    set_params(colleague, {"grid.size": 5})
    done = run(colleague, "dvc", "repro", "--pull").stdout

    assert stages_run(done) == []
    assert "Stage 'render_grid' is cached" in done
    assert_whole(colleague)
    assert (colleague / "plots/grid.png").read_bytes() == (origin[0].parent / "of 5.png").read_bytes()
    assert not (colleague / "mlflow.db").exists()


def test_sharing_without_a_remote_is_one_line_and_a_failure(finished_pipeline):
    done = run(finished_pipeline, sys.executable, "-m", "tools.share", env={"PYTHONPATH": "src"}, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("share: ")
    assert "no remote" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_remote_that_does_not_answer_is_one_line_and_a_failure(finished_pipeline):
    remote = "[core]\n    remote = gone\n['remote \"gone\"']\n    url = /proc/gone\n"
    (finished_pipeline / ".dvc/config.local").write_text(remote)
    try:
        done = run(finished_pipeline, sys.executable, "-m", "tools.share", env={"PYTHONPATH": "src"}, check=False)
    finally:
        (finished_pipeline / ".dvc/config.local").unlink()

    assert done.returncode == 1
    assert done.stderr.startswith("share: ")
    assert "Traceback" not in done.stderr
