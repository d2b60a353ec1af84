"""`dvc push` and `dvc pull`: a colleague gets the results with a clone, and repeats none of the work.

What is committed of a remote is where it is. Who somebody is there (user, key) stays in their .dvc/config.local.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnist_vae.model.model_file import load_model
from stages.outputs import hash_of
from tests.pipeline import commit, introduce, run, set_params, stages_run
from tests.runs import artifacts, stored_runs
from tests.tracking import copy_workspace
from tools.verify import read_lock

pytestmark = pytest.mark.slow

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
REMOTES = ["folder", "ssh"]

SSHD_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""


@pytest.fixture(scope="module")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Debian's own SSH server as an ordinary process: its port on 127.0.0.1, and the key that it lets in."""
    if SSHD is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs sshd and ssh-keygen (Debian: openssh-server)")
    if importlib.util.find_spec("dvc_ssh") is None:
        pytest.skip("needs the Python package dvc-ssh")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation asks for it
    folder = tmp_path_factory.mktemp("sshd")
    for key in ("host_key", "key"):
        run(folder, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config").write_text(SSHD_CONFIG.format(port=port, folder=folder))
    log = folder / "log"
    server = subprocess.Popen([SSHD, "-D", "-f", folder / "config", "-E", log], stdin=subprocess.DEVNULL)
    try:
        wait_for(port, server, log)
        yield port, folder / "key"
    finally:
        server.terminate()
        server.wait(timeout=10)


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    """Return when the server answers."""
    for _ in range(100):
        if server.poll() is not None:
            break
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"sshd does not answer:\n{log.read_text()}")


@pytest.fixture(scope="module", params=REMOTES)
def shared(request, finished_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Author and colleague: one has pushed, the other has cloned and pulled."""
    folder = tmp_path_factory.mktemp(f"by_{request.param}")
    author, colleague = folder / "author", folder / "colleague"
    copy_workspace(finished_pipeline, author)
    where, who = "../storage", {}
    if request.param == "ssh":
        port, key = request.getfixturevalue("ssh_server")
        where, who = f"ssh://127.0.0.1:{port}{folder}/storage", {"keyfile": str(key)}
    run(author, "dvc", "remote", "add", "--default", "storage", where)
    commit(author, "Where results are shared")

    introduce(author, who)
    run(author, "dvc", "push")
    run(folder, "git", "clone", "--quiet", author, colleague)
    introduce(colleague, who)
    run(colleague, "dvc", "pull")
    return author, colleague


@pytest.fixture
def colleague(shared: tuple[Path, Path], tmp_path: Path) -> Path:
    """The colleague's clone, to be changed at will."""
    return copy_workspace(shared[1], tmp_path / "colleague")


def test_a_clone_and_a_pull_bring_every_artifact(shared):
    author, colleague = shared
    artifacts = read_lock((author / "dvc.lock").read_bytes())
    assert {
        "data/dataset",
        "models/vae.safetensors",
        "plots/grid.png",
        "plots/explorer.html",
        "metrics/report.md",
    } <= {artifact.path for artifact in artifacts}
    for artifact in artifacts:
        assert hash_of(colleague / artifact.path) == artifact.md5, artifact.path


def test_the_remote_holds_what_git_does_not(shared):
    author, colleague = shared
    in_git = run(author, "git", "ls-files").stdout.splitlines()
    stored = {
        path.parent.name + path.name for path in (author.parent / "storage/files/md5").rglob("*") if path.is_file()
    }
    artifacts = read_lock((author / "dvc.lock").read_bytes())
    arrays = {hash_of(file) for file in (author / "data/dataset").iterdir()}
    assert stored == {artifact.md5 for artifact in artifacts if artifact.path not in in_git} | arrays
    assert "Everything is up to date" in run(colleague, "dvc", "push").stdout


def test_git_keeps_where_the_remote_is_and_not_who_one_is(shared):
    author, colleague = shared
    assert "storage" in run(colleague, "dvc", "remote", "list").stdout
    assert "key" not in run(author, "git", "show", "HEAD:.dvc/config").stdout
    assert run(colleague, "git", "status", "--porcelain").stdout == ""


def test_a_colleague_repeats_no_work(colleague):
    again = run(colleague, "dvc", "repro").stdout
    assert stages_run(again) == []
    assert "Data and pipelines are up to date" in again
    assert not (colleague / "mlflow.db").exists()
    assert run(colleague, "git", "status", "--porcelain").stdout == ""


def test_a_colleague_sees_plots_and_numbers(colleague):
    run(colleague, "dvc", "plots", "show")
    page = (colleague / "dvc_plots" / "index.html").read_text()
    for name in ("grid", "latents", "losses", "nll", "reconstructions", "samples", "traversal"):
        assert f"{name}.png" in page, name
    assert page.count("vega") > 1
    assert "train_loss" in run(colleague, "dvc", "metrics", "show").stdout


@pytest.mark.parametrize("shared", ["folder"], indirect=True)
def test_a_colleague_goes_on_in_a_store_of_their_own_with_one_run_for_the_pulled_model(colleague):
    set_params(colleague, {"grid.size": 4})
    assert stages_run(run(colleague, "dvc", "repro").stdout) == ["render_grid"]
    set_params(colleague, {"samples.rows": 1})
    assert stages_run(run(colleague, "dvc", "repro").stdout) == ["render_samples"]

    [found] = stored_runs(colleague)
    assert found.info.status == "FINISHED"
    assert found.data.tags["fingerprint"] == load_model(colleague / "models/vae.safetensors").fingerprint
    assert found.data.params["grid.size"] == "4"
    assert found.data.params["samples.rows"] == "1"
    pictures = {name for name in artifacts(found) if name.endswith(".png")}
    assert pictures == {"plots/grid.png", "plots/samples.png", "description.png"}
