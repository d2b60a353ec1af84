"""`python -m sweep` without a pipeline: which experiments, under which names, and what is left to run."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from dvc.repo import Repo
from filelock import FileLock

from mnist_vae.errors import UserError
from sweep import __main__ as command
from sweep import experiment as sweep_experiment
from sweep import slot
from sweep.repository import HERE, Repository
from sweep.slot import Outcome, Sweep, git, reference
from sweep.space import Range, grid, name_of, overrides, read_space

PARAMS = Path(__file__).parent.parent / "params.yaml"


def read(*arguments: str, ranges: bool = False):
    return read_space(arguments, PARAMS, ranges=ranges)


def names(*arguments: str) -> list[str]:
    return [name_of(point) for point in grid(read(*arguments))]


def test_a_grid_has_every_combination():
    assert names("model.latent_dim=2,5", "train.seed=1,2") == [
        "latent_dim=2,train.seed=1",
        "latent_dim=2,train.seed=2",
        "latent_dim=5,train.seed=1",
        "latent_dim=5,train.seed=2",
    ]


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("train.epochs=3", [3]),
        ("train.epochs=range(1,4)", [1, 2, 3]),
        ("model.hidden_dims=[400],[200,200]", [[400], [200, 200]]),
        ("train.learning_rate=1e-3,0.002", [0.001, 0.002]),
        ("train.betas=[0.9,0.999]", [[0.9, 0.999]]),
        ("data.dataset='mnist',digits", ["mnist", "digits"]),
        ("data.fallback=null,digits", [None, "digits"]),
    ],
)
def test_values_are_read_as_dvc_reads_them(argument, values):
    assert list(read(argument).values()) == [values]


def test_whole_numbers_in_a_list_of_decimals_are_decimals():
    assert names("train.betas=[0,0.99]") == names("train.betas=[0.0,0.99]") == ["betas=0.0x0.99"]


def test_a_name_depends_on_the_values_and_not_on_how_they_were_given():
    expected = ["latent_dim=2,train.seed=1,kl_weight=1.0"]
    assert names("train.kl_weight=1", "model.latent_dim=2", "train.seed=1") == expected
    assert names("train.seed=1,1", "model.latent_dim=2", "train.kl_weight=1.0,1e0") == expected


@pytest.mark.parametrize("value", ["[400]", "[200,200]", "[1,2,3,4,5,6,7,8]", "[1000,1000,1000,1000]"])
def test_names_are_those_of_git_references(value):
    every = [f"model.hidden_dims={value}", "train.betas=[0.9,0.999]", "train.eps=1e-8"]
    every += ["data.dataset=mnist", "data.fallback=null", "train.weight_decay=1e-5", "train.kl_warmup=0.25"]
    every += ["evaluate.quadrature_step=0.04", "train.importance_samples=5", "grid.quantiles=[0.05,0.95]"]
    [name] = names(*every)
    assert len(name) < 130
    assert "/" not in name
    subprocess.run(["git", "check-ref-format", reference("0" * 40, name)], check=True)


def test_names_are_no_longer_in_bytes_than_in_characters():
    [name] = names("data.dataset='/" + "数" * 100 + "'")
    assert len(name.encode()) <= 120


def test_long_names_differ_where_their_ends_do():
    long = ["model.hidden_dims=[1000,1000,1000,1000,1000,1000,1000,1000]", "data.fallback=null"]
    long += ["train.betas=[0.9,0.999]", "train.eps=1e-8", "train.weight_decay=1e-5", "train.kl_warmup=0.25"]
    assert len(set(names(*long, "grid.size=3,4,5"))) == 3


def test_a_folder_counts_from_where_the_command_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(read(f"data.dataset=mnist,../faces,./a,{tmp_path}/a/").values()) == [
        ["mnist", str(tmp_path.parent / "faces"), str(tmp_path / "a")]
    ]


def test_names_of_folders_differ_where_the_folders_do():
    found = names("data.dataset=mnist,/d/a_b,/d/a/b,/d/a..b")
    assert found[0] == "dataset=mnist"
    assert len(set(found)) == 4
    for name in found:
        assert "/" not in name
        subprocess.run(["git", "check-ref-format", reference("0" * 40, name)], check=True)


@pytest.mark.parametrize("folder", ["/d/faces", "/d/my faces", "/d/Jürgen's (1), 2"])
def test_a_folder_reaches_dvc_whatever_its_name(folder):
    quoted = folder.replace("'", r"\'")
    [override] = overrides({"data.dataset": folder})
    assert read(override) == read(f"data.dataset='{quoted}'") == {"data.dataset": [folder]}


def test_overrides_are_what_dvc_takes():
    [point] = grid(read("model.hidden_dims=[200,200]", "data.fallback=null", "train.eps=1e-8"))
    assert overrides(point) == ["data.fallback=null", "model.hidden_dims=[200,200]", "train.eps=1e-08"]


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("model.latnt_dim=2", "model.latnt_dim is not a parameter; did you mean model.latent_dim?"),
        ("model=2", "model is a section; name one of its parameters, as model.hidden_dims"),
        ("model.latent_dim=2,0", "model.latent_dim is 0; it must be at least 1"),
        ("model.latent_dim=two", "model.latent_dim is 'two'; it must be a whole number"),
        ("train.learning_rate=nan", "train.learning_rate is nan; it must be a finite number"),
        ("model.hidden_dims=[400", "model.hidden_dims=[400 cannot be read"),
        ("model.latent_dim", "model.latent_dim cannot be read"),
        ("+train.new=1", "give name=value"),
        ("~train.seed", "give name=value"),
        ("train.seed=glob(*)", "cannot be read"),
        ("train.seed=interval(1,2)", "give values with commas between them"),
        ("model.latent_dim=2..20", "a range needs --suggest N"),
        ("model.latent_dim=20..2", "a range goes from its lower to its higher end"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(argument, complaint):
    with pytest.raises(UserError) as told:
        read(argument)
    assert complaint in str(told.value)
    assert "\n" not in str(told.value)


def test_a_parameter_is_given_once():
    with pytest.raises(UserError, match="given twice"):
        read("train.seed=1", "train.seed=2")


@pytest.mark.parametrize(
    ("argument", "range_", "is_whole", "is_log"),
    [
        ("model.latent_dim=2..19", Range(2, 19), True, False),
        ("model.latent_dim=2..20", Range(2, 20), True, True),
        ("train.learning_rate=1e-4..1e-2", Range(1e-4, 1e-2), False, True),
        ("train.kl_warmup=0..1", Range(0.0, 1.0), False, False),
    ],
)
def test_a_range_is_of_whole_numbers_or_of_decades_as_its_ends_say(argument, range_, is_whole, is_log):
    [found] = read(argument, ranges=True).values()
    assert found == range_
    assert (found.is_whole, found.is_log) == (is_whole, is_log)


def test_the_ends_of_a_range_must_be_values():
    with pytest.raises(UserError, match="at least 1"):
        read("model.latent_dim=0..20", ranges=True)
    with pytest.raises(UserError, match="whole number"):
        read("model.latent_dim=2.0..20", ranges=True)


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep", "-S", "train.seed=1"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install .*\[sweep\]"):
        command.main()


@pytest.mark.parametrize(("metric", "way"), [("nll", "minimize"), ("elbo", "maximize"), ("knn_accuracy", "maximize")])
def test_a_metric_knows_which_way_it_gets_better(metric, way):
    assert command.direction(metric, None) == way
    assert command.direction(metric, "minimize") == "minimize"


# The worker's side, without a pipeline.


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A repository with one commit."""
    folder = tmp_path / "source"
    git("init", "--quiet", "--initial-branch", "main", str(folder))
    for name, value in {"user.name": "A Tester", "user.email": "tester@example.org", "commit.gpgsign": "false"}.items():
        git("config", name, value, folder=folder)
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n")
    (folder / "params.yaml").write_text("a: 1\n")
    (folder / ".gitignore").write_text("/checkpoints/\n")
    git("add", "--all", folder=folder)
    git("commit", "--quiet", "--message", "One", folder=folder)
    return folder


def sweep_of(source: Path, folder: Path, **settings: str) -> Sweep:
    commit = git("rev-parse", "HEAD", folder=source).strip()
    return Sweep(commit, str(source), folder=str(folder), **settings)


def experiment(source: Path, sweep: Sweep, name: str) -> None:
    """What `dvc exp push` leaves in the source."""
    git("update-ref", reference(sweep.commit, name), sweep.commit, folder=source)


@pytest.fixture
def shared(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    """The sweep over machines of a repository that has a git remote, by its MLflow store and its DVC remote."""
    git("clone", "--quiet", "--bare", str(source), str(tmp_path / "origin"))
    git("remote", "add", "origin", str(tmp_path / "origin"), folder=source)

    def call(uri: str, url: str) -> Sweep:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        settings = f"[core]\n    remote = storage\n['remote \"storage\"']\n    url = {url}\n"
        (source / ".dvc" / "config").write_text(settings)
        git("commit", "--quiet", "--all", "--message", "A remote", folder=source)
        git("push", "--quiet", "origin", "main", folder=source)
        return Repository(source, "origin").sweep()

    return call


@pytest.mark.parametrize("uri", ["http://server:5000", "sqlite:////shared/mlflow.db", "databricks"])
@pytest.mark.parametrize("url", ["s3://bucket/folder", "/shared/storage", "~/storage"])
def test_a_sweep_over_machines_takes_what_is_the_same_for_all_workers(shared, tmp_path, uri, url):
    sweep = shared(uri, url)
    assert (sweep.source, sweep.environment) == (str(tmp_path / "origin"), {"MLFLOW_TRACKING_URI": uri})


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "file:mlruns", "./mlruns"])
def test_a_store_that_each_worker_would_have_of_its_own_is_refused(shared, uri):
    with pytest.raises(UserError, match=f"^MLFLOW_TRACKING_URI is {uri}, a relative path"):
        shared(uri, "/shared/storage")


@pytest.mark.parametrize("uri", ["./mlruns", "file:mlruns"])
def test_on_one_machine_a_relative_store_is_the_folders_own(source, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Repository(source, HERE).sweep().environment["MLFLOW_TRACKING_URI"] == str(source / "mlruns")


def test_a_dvc_remote_that_each_worker_would_have_of_its_own_is_refused(shared):
    with pytest.raises(UserError, match=r"^the DVC remote storage is at \.\./\.\./storage, a relative path"):
        shared("http://server:5000", "../../storage")


def test_several_experiments_are_fetched_at_once_and_none_if_none_is_named(shared, source, tmp_path):
    sweep = shared("http://server:5000", "/shared/storage")
    for name in ("a=1", "a=2", "a=3"):
        experiment(tmp_path / "origin", sweep, name)
    repository = Repository(source, "origin")
    repository.fetch([])
    repository.fetch(["a=1", "a=3"])
    fetched = git("for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps", folder=source)
    assert fetched.split() == ["a=1", "a=3"]
    assert repository.existing() == {"a=1", "a=2", "a=3"}


def test_a_remote_that_cannot_be_reached_is_tried_again(shared, source, tmp_path, monkeypatch):
    shared("http://server:5000", "s3://bucket/folder")
    repository, away = Repository(source, "origin"), tmp_path / "away"
    experiment(tmp_path / "origin", sweep_of(source, tmp_path), "a=1")
    (tmp_path / "origin").rename(away)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"git fetch: .*does not"):
        repository.fetch(["a=1"])
    monkeypatch.setattr("time.sleep", lambda seconds: away.rename(tmp_path / "origin"))

    repository.fetch(["a=1"])

    assert repository.existing() == {"a=1"}


def test_two_experiments_at_once_have_two_slots_and_the_first_is_used_again(tmp_path):
    with slot.free_slot(tmp_path) as (first, _), slot.free_slot(tmp_path) as (second, _):
        assert first != second
    with slot.free_slot(tmp_path) as (again, _):
        assert again == first


def test_a_slot_is_taken_as_long_as_what_was_started_in_it_lives(tmp_path):
    with slot.free_slot(tmp_path) as (first, lock):
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock])
    with slot.free_slot(tmp_path) as (other, _):
        assert other != first
    child.communicate()
    with slot.free_slot(tmp_path) as (again, _):
        assert again == first


def test_a_slot_is_made_whole_whatever_a_killed_worker_left(source, tmp_path):
    sweep = sweep_of(source, tmp_path, cache="/the/cache, #1")
    place = tmp_path / "slot-0"
    place.mkdir()
    (place / "half").write_text("a clone")
    slot.prepare(place, sweep)
    (place / "params.yaml").write_text("a: 2\n")
    (place / "left").write_text("behind")
    (place / "checkpoints").mkdir()
    (place / "checkpoints" / "last.ckpt").write_text("to go on from")
    (place / ".git" / "index.lock").touch()
    experiment(place, sweep, "a=1")
    (place / ".git" / f"{reference(sweep.commit, 'a=1')}.lock").touch()
    (place / ".dvc" / "tmp").mkdir()
    (place / ".dvc" / "tmp" / "rwlock").write_text("{")
    slot.prepare(place, sweep)
    slot.remove_reference(place, sweep, "a=1")
    assert (place / "params.yaml").read_text() == "a: 1\n"
    assert not (place / "left").exists()
    assert (place / "checkpoints" / "last.ckpt").exists()
    assert not (place / ".dvc" / "tmp").exists()
    with Repo(str(place)) as repo:
        assert repo.config["cache"]["dir"] == "/the/cache, #1"


@pytest.mark.parametrize("file", ["HEAD", "config", "index", "objects"])
def test_a_slot_whose_repository_is_damaged_is_made_anew_and_what_is_around_it_is_spared(source, file):
    """Where git finds no repository, it takes the next one above: here, as by default, the source itself."""
    stand_in(source, "")
    place = source / "slots" / "slot-0"
    sweep = sweep_of(source, source / "slots")
    assert slot.run_in_slot(sweep, "a=1", []) == Outcome("a=1")
    (source / "params.yaml").write_text("a: 2\n")
    (source / "new").write_text("not committed")
    git("remote", "add", "origin", "https://example.org/theirs", folder=source)
    damaged = place / ".git" / file
    shutil.rmtree(damaged) if damaged.is_dir() else damaged.write_bytes(b"")

    assert slot.run_in_slot(sweep, "a=1", []) == Outcome("a=1")

    assert (place / "params.yaml").read_text() == "a: 1\n"
    assert (source / "params.yaml").read_text() == "a: 2\n"
    assert (source / "new").exists()
    assert git("rev-parse", "--abbrev-ref", "HEAD", folder=source) == "main\n"
    assert git("remote", "get-url", "origin", folder=source) == "https://example.org/theirs\n"


def test_a_slot_follows_to_a_later_commit(source, tmp_path):
    slot.prepare(tmp_path / "slot-0", sweep_of(source, tmp_path))
    (source / "params.yaml").write_text("a: 3\n")
    git("checkout", "--quiet", "--detach", folder=source)
    git("commit", "--quiet", "--all", "--message", "On no branch", folder=source)
    slot.prepare(tmp_path / "slot-0", sweep_of(source, tmp_path))
    assert (tmp_path / "slot-0" / "params.yaml").read_text() == "a: 3\n"


def test_a_slot_follows_a_source_whose_branch_made_room_for_another(source, tmp_path):
    git("branch", "feature", folder=source)
    slot.prepare(tmp_path / "slot-0", sweep_of(source, tmp_path))
    git("branch", "--move", "feature", "feature/x", folder=source)
    slot.prepare(tmp_path / "slot-0", sweep_of(source, tmp_path))


def test_an_experiment_that_is_there_is_not_run_again(source, tmp_path):
    sweep = sweep_of(source, tmp_path)
    experiment(source, sweep, "a=1")
    assert slot.run_in_slot(sweep, "a=1", ["a=1"]) == Outcome("a=1")
    assert not (tmp_path / "slot-0").exists()


def stand_in(source: Path, program: str) -> None:
    """Commit a program in place of the one that runs an experiment."""
    (source / "sweep").mkdir()
    (source / "sweep" / "experiment.py").write_text(program)
    git("add", "--all", folder=source)
    git("commit", "--quiet", "--message", "Only pretends", folder=source)


def test_an_experiment_that_another_scheduler_finished_first_has_not_failed(source, tmp_path):
    stand_in(
        source,
        "import subprocess, sys; commit = subprocess.getoutput('git rev-parse HEAD');"
        "subprocess.run(['git', 'push', 'origin', f'HEAD:refs/exps/{commit[:2]}/{commit[2:]}/a=1'], check=True);"
        "sys.exit('error: failed to push some refs')",
    )
    assert slot.run_in_slot(sweep_of(source, tmp_path), "a=1", []) == Outcome("a=1")


@pytest.mark.parametrize(
    ("asked", "taken", "is_result"), [("mnist", "digits", False), ("mnist", "mnist", True), ("digits", "digits", True)]
)
def test_digits_in_the_place_of_mnist_are_no_result(tmp_path, monkeypatch, asked, taken, is_result):
    pushed = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiment", "a=1", "", f"data.dataset={asked}"])
    for name in ("end_with_input", "call"):
        monkeypatch.setattr(sweep_experiment, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(sweep_experiment, "push_reference", pushed.append)
    Path("params.yaml").write_text(f"data:\n  dataset: {asked}\n")
    Path("metrics").mkdir()
    Path("metrics", "evaluate.json").write_text(f'{{"dataset": "{taken}"}}')

    with nullcontext() if is_result else pytest.raises(SystemExit, match="no MNIST here"):
        sweep_experiment.main()

    assert pushed == (["a=1"] if is_result else [])


def test_an_experiment_that_fails_says_why_and_where_its_log_is(source, tmp_path):
    stand_in(source, "import sys; print('train: the reason'); sys.exit(3)")
    outcome = slot.run_in_slot(sweep_of(source, tmp_path), "a=1", ["a=1"])
    assert outcome.error == "train: the reason"
    log = Path(outcome.log.partition(":")[2])
    assert log.read_text() == "train: the reason\n"


def test_a_stage_that_does_not_end_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr(slot, "PATIENCE_S", 0.1)
    sweep, place = sweep_of(source, tmp_path), tmp_path / "slot-0"
    slot.prepare(place, sweep)
    lock = place / ".dvc" / "tmp" / "stage.lock"
    lock.parent.mkdir()
    with FileLock(lock):
        lock.write_text("train, process 7")
        outcome = slot.run_in_slot(sweep, "a=1", [])
    assert outcome.error == f"another stage still works in {place} (train, process 7); end that process"


def test_a_source_that_cannot_be_reached_is_a_failure_with_its_reason(source, tmp_path):
    sweep = sweep_of(source, tmp_path)._replace(source=str(tmp_path / "nowhere"))
    outcome = slot.run_in_slot(sweep, "a=1", ["a=1"])
    assert "nowhere" in outcome.error


def test_an_experiment_ends_with_the_worker_that_started_it(source, tmp_path):
    """The worker is killed outright; the slot's locks tell when the last of its processes is gone."""
    worker = (
        "from pathlib import Path; from tests.test_sweep import *;"
        f"slot.run_in_slot(sweep_of(Path({str(source)!r}), Path({str(tmp_path)!r})), 'a=1', [])"
    )
    stage = (
        "import os, time; from pathlib import Path; from filelock import FileLock\n"
        "with FileLock('.dvc/tmp/stage.lock'):\n"
        "    parent = os.getppid(); Path('../started').touch()\n"
        "    while os.getppid() == parent: time.sleep(0.05)\n"
        "    time.sleep(1); Path('../ended').touch()"
    )
    stand_in(
        source,
        "import subprocess, sys; from pathlib import Path; Path('.dvc/tmp').mkdir();"
        f"subprocess.Popen([sys.executable, '-c', {stage!r}], stdin=subprocess.DEVNULL); sys.stdin.read()",
    )
    process = subprocess.Popen([sys.executable, "-c", worker], cwd=Path(__file__).parent.parent)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    with (tmp_path / "slot-0.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for as long as an experiment lives
        slot.prepare(tmp_path / "slot-0", sweep_of(source, tmp_path))
    assert (tmp_path / "ended").exists()


def test_what_an_experiment_calls_holds_its_slot_even_if_the_experiment_is_killed(tmp_path):
    held = tmp_path / "held"
    called = f"import os, time; open({str(held)!r}, 'w').close()\nwhile os.path.exists({str(held)!r}): time.sleep(0.05)"
    calling = f"import sys; from sweep.experiment import call; call(program=[sys.executable, '-c', {called!r}])"
    with slot.free_slot(tmp_path) as (first, lock):
        process = subprocess.Popen([sys.executable, "-c", calling], pass_fds=[lock])
    while not held.exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    with slot.free_slot(tmp_path) as (other, _):
        assert other != first
    held.unlink()
    with (tmp_path / f"{first.name}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for its end


def test_a_push_that_is_killed_leaves_no_lock_to_the_next(source, tmp_path):
    """Killed while the remote holds the reference's lock, as a hook of the remote tells."""
    sweep = sweep_of(source, tmp_path)
    slot.prepare(tmp_path / "slot-0", sweep)
    experiment(tmp_path / "slot-0", sweep, "a=1")
    held, lock = tmp_path / "held", source / ".git" / f"{reference(sweep.commit, 'a=1')}.lock"
    hook = source / ".git" / "hooks" / "reference-transaction"
    hook.write_text(
        f"#!/bin/sh\n[ $1 != prepared ] || {{ touch '{held}'; while [ -e '{held}' ]; do sleep 0.05; done; }}"
    )
    hook.chmod(0o755)
    push = [sys.executable, "-c", "from sweep.experiment import push_reference; push_reference('a=1')"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    pushing = psutil.Popen(push, cwd=tmp_path / "slot-0", env=environment)
    while not held.exists():
        assert pushing.poll() is None
    assert lock.exists()
    for process in (pushing, *pushing.children()):  # not the remote's, which a signal to these does not reach
        process.kill()
    pushing.wait()
    held.unlink()
    hook.unlink()
    while lock.exists():
        time.sleep(0.05)
    subprocess.run(push, cwd=tmp_path / "slot-0", env=environment, check=True)
    assert slot.is_there(sweep, "a=1")


@pytest.mark.parametrize(
    ("printed", "line"),
    [
        ("train: no memory\nERROR: failed to reproduce 'train': failed to run\n", "train: no memory"),
        ("Running stage 'train'\nERROR: no git\nWARNING: old\n", "ERROR: no git"),
        ("Killed\n", "Killed"),
        ("", "ended with status 1"),
    ],
)
def test_the_reason_of_a_failure_is_the_line_that_says_most(printed, line):
    assert slot.reason(printed, "ended with status 1") == line
