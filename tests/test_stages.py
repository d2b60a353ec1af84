"""The process of a stage: what it loads, what it says to a wrong call, who may stop it, and that it works alone."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from mnist_vae.errors import UserError
from stages import artifacts, stage
from stages.__main__ import has_one_thread

REPOSITORY = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": "src"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("stage", "threads", "one"), [("train", 1, True), ("evaluate", 2, False), ("render_grid", 2, True)]
)
def test_a_stage_computes_in_one_thread_unless_it_is_given_more(stage, threads, one, tmp_path, monkeypatch):
    text = (REPOSITORY / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("threads: 1 ", f"threads: {threads} "))
    monkeypatch.chdir(tmp_path)
    assert has_one_thread(stage) == one


def test_wrong_parameters_are_for_the_stage_to_tell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert has_one_thread("train")


def test_libraries_are_told_before_they_are_loaded():
    asked = "import sys; from stages.__main__ import has_one_thread; has_one_thread('train'); print(*sys.modules)"
    loaded = set(python("-c", asked).stdout.split())
    assert "mnist_vae.params" in loaded
    assert not {"numpy", "scipy", "torch"} & loaded


# five stages are five processes, and imports are most of a short one


@pytest.mark.parametrize(
    ("name", "unneeded"),
    [
        (
            "download",
            {"torch", "torchvision", "lightning", "mlflow", "matplotlib", "sklearn", "scipy", "pandas", "dvc"},
        ),
        ("train", {"mlflow", "sklearn", "pandas", "dvc"}),
        ("evaluate", {"torchvision", "lightning", "mlflow", "matplotlib.pyplot", "dvc"}),
        ("render_samples", {"torchvision", "lightning", "mlflow", "sklearn", "scipy", "pandas", "dvc"}),
        ("render_grid", {"torchvision", "lightning", "mlflow", "sklearn", "scipy", "pandas", "dvc"}),
    ],
)
def test_a_stage_imports_what_it_uses(name, unneeded):
    loaded = python("-c", f"import sys, stages.stage, stages.{name}; print(*sys.modules)")
    assert loaded.returncode == 0, loaded.stderr
    assert unneeded.isdisjoint(loaded.stdout.split())


# tables that stages pass to each other


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Write a table into plots/, as the current folder has it."""
    monkeypatch.chdir(tmp_path)
    artifacts.PLOTS.mkdir()
    return Path.write_text


@pytest.mark.parametrize(("text", "columns"), [("z0,z1\n0.5,1\n", "z0 z1"), ("digit,z0,z1\n7,0.5,1\n", "digit z0 z1")])
def test_codes_are_read_with_labels_and_without(table, text, columns):
    table(artifacts.CODES, text)
    assert list(artifacts.read_codes(2)) == columns.split()


@pytest.mark.parametrize("validation", [[], ["val_loss", "val_bce", "val_kld"]])
def test_losses_are_read_with_a_validation_and_without(table, validation):
    columns = ["epoch", "loss", "bce", "kld", *validation, "binarize"]
    table(artifacts.LOSSES, f"{','.join(columns)}\n{'1,' * (len(columns) - 1)}none\n")
    assert list(artifacts.read_losses()) == columns


HTML = "<html>404</html>\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HTML, "its columns are <html>404</html>"),
        ("1,a,b\n", "its columns are 1, a, b"),
        ("digit,z0,z1,z2\n7,1,2,3\n", "its columns are digit, z0, z1, z2"),
        ("digit,z0,z1\n", "it has no rows"),
        ("digit,z0,z1\n7,0.5,\n", "a value is missing or not finite"),
        ("digit,z0,z1\n7,0.5,inf\n", "a value is missing or not finite"),
        ("digit,z0,z1\n7,0.5,a\n", "could not convert string to float: 'a'"),
        ("digit,z0,z1\n,0.5,1\n", "Integer column has NA values in column 0"),
        (
            "digit,z0,z1\n300,0.5,1\n",
            "cannot safely convert passed user dtype of uint8 for int64 dtyped data in column 0",
        ),
        (f"digit,z0,z1\n{30 * '9'},0.5,1\n", "Overflow"),
        ("digit,z0,z1\n7,1,2,3\n", "its rows have more values than its first line has names"),
        ("", "No columns to parse from file"),
    ],
)
def test_codes_that_evaluate_did_not_write_are_refused_in_one_line(table, text, reason):
    table(artifacts.CODES, text)
    with pytest.raises(UserError) as refused:
        artifacts.read_codes(2)
    assert str(refused.value) == (
        f"plots/latents.csv is damaged or not what this project writes ({reason}); "
        "`dvc repro --force --single-item evaluate` makes it again"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HTML, "its columns are <html>404</html>"),
        ("epoch,bce,kld,binarize\n1,2,3,none\n", "its columns are epoch, bce, kld, binarize"),
        ("epoch,loss,bce,kld\n1,2,3,4\n", "its columns are epoch, loss, bce, kld"),
        ("epoch,loss,bce,kld,binarize\n1,a,3,4,none\n", "could not convert string to float: 'a'"),
    ],
)
def test_losses_that_train_did_not_write_are_refused_in_one_line(table, text, reason):
    table(artifacts.LOSSES, text)
    with pytest.raises(UserError) as refused:
        artifacts.read_losses()
    assert str(refused.value) == (
        f"plots/losses.csv is damaged or not what this project writes ({reason}); "
        "`dvc repro --force --single-item train` makes it again"
    )


# a wrong call


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "evaluate"]])
def test_a_wrong_call_gets_the_usage_in_one_line(arguments):
    refused = python("-m", "stages", *arguments)
    assert refused.returncode == 1
    assert refused.stderr == "usage: python -m stages {download|train|evaluate|render_samples|render_grid}\n"


def test_an_interpreter_without_the_packages_is_told_where_they_are():
    refused = python("-S", "-m", "stages", "train")  # -S: without site-packages
    assert refused.returncode == 1
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"{sys.executable} has no torch")
    assert "`make setup`" in line


# signals


@pytest.fixture
def _handlers() -> Iterator[None]:
    """What a test does to the handlers of signals is undone."""
    before = {number: signal.getsignal(number) for number in stage.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", stage.SIGNALS)
def test_end_on_signals_ends_the_process_once_with_the_status_of_the_signal(number):
    stage.end_on_signals()
    with pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    for other in stage.SIGNALS:
        os.kill(os.getpid(), other)  # is ignored, else this test would end here


@pytest.mark.usefixtures("_handlers")
def test_end_on_signals_leaves_a_signal_ignored_that_is_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    stage.end_on_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_end_with_dvc_ends_a_stage_whose_dvc_is_gone_already(monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.setattr(stage, "PARENT", os.getppid() + 1)
    with pytest.raises(SystemExit) as stopped:
        stage.end_with_dvc()
    assert stopped.value.code == 128 + signal.SIGTERM


# one stage at a time


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileLock]:
    """A folder in which another stage works."""
    monkeypatch.chdir(tmp_path)
    stage.LOCK.parent.mkdir(parents=True)
    with FileLock(stage.LOCK) as lock:
        stage.LOCK.write_text("train, process 123")
        yield lock


def test_only_stage_here_refuses_in_the_end_and_names_the_other_stage(busy, monkeypatch, capsys):
    monkeypatch.setattr(stage, "LOCK_TIMEOUT_S", 0.1)
    refused = pytest.raises(UserError, match=r"another stage still works in this folder \(train, process 123\)")
    with refused, stage.only_stage_here("evaluate"):
        pytest.fail("two stages at once")
    assert "evaluate: waiting for another stage in this folder to end (train, process 123)" in capsys.readouterr().err


def test_only_stage_here_goes_on_when_the_other_stage_has_ended(busy):
    busy.release()
    with stage.only_stage_here("evaluate"):
        assert stage.LOCK.read_text() == f"evaluate, process {os.getpid()}"
    with stage.only_stage_here("evaluate"):
        pass
