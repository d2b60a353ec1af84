"""The driver of a sweep on a real Dask cluster inside this process, with experiments that only pretend to run."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from mnist_vae.errors import UserError
from sweep import __main__ as main
from sweep.slot import Outcome, Sweep
from sweep.space import Range, name_of

optuna = pytest.importorskip("optuna", reason="needs the extra: sweep")
driver = pytest.importorskip("sweep.driver", reason="needs the extra: sweep", exc_type=ImportError)
suggest = pytest.importorskip("sweep.suggest", reason="needs the extra: sweep", exc_type=ImportError)

Goal, Grid, connect, drive = driver.Goal, driver.Grid, driver.connect, driver.drive
Suggestions, TrialState = suggest.Suggestions, optuna.trial.TrialState
NLL = Goal("nll", maximize=False)
PARAMS = Path(__file__).parent.parent / "params.yaml"
SWEEP = Sweep("c" * 40, "nowhere")
POINTS = [{"model.latent_dim": value} for value in (2, 3, 5, 8)]
SPACE = {"model.latent_dim": Range(2, 20), "train.learning_rate": Range(1e-4, 1e-2), "model.hidden_dims": [[8], [4, 4]]}


class Experiments:
    """In place of the repository and its workers: what exists, and what was run."""

    remote = "."

    def __init__(self, *broken: str) -> None:
        self.there: dict[str, dict[str, float]] = {}
        self.runs: list[str] = []
        self.broken = broken

    def existing(self) -> set[str]:
        return set(self.there)

    def fetch(self, names: list[str]) -> None:
        pass

    def metrics(self, name: str) -> dict[str, float]:
        return self.there[name]

    def run(self, sweep: Sweep, name: str, settings: list[str]) -> Outcome:
        self.runs.append(name)
        if name in self.broken:
            return Outcome(name, "train: the reason", "host:file")
        given = dict(setting.split("=", 1) for setting in settings)
        self.there[name] = {"nll": abs(10 - int(given["model.latent_dim"]))}
        return Outcome(name)


@pytest.fixture(scope="module")
def client() -> Iterator["distributed.Client"]:  # noqa: F821
    with connect(None, jobs=2) as client:
        yield client


def run_all(client, plan, experiments: Experiments, monkeypatch):
    # What travels to a worker is pickled; these experiments stay here.
    monkeypatch.setattr(Experiments, "current", experiments, raising=False)
    return drive(client, plan, experiments, SWEEP, NLL, run=pretend)


def pretend(sweep: Sweep, name: str, settings: list[str]) -> Outcome:
    return Experiments.current.run(sweep, name, settings)


def test_every_point_is_run_once(client, monkeypatch):
    experiments = Experiments()
    report = run_all(client, Grid(POINTS), experiments, monkeypatch)
    assert sorted(experiments.runs) == sorted(map(name_of, POINTS))
    assert report.metrics == experiments.there
    assert report.failures == []


def test_what_is_there_is_not_run_again(client, monkeypatch):
    experiments = Experiments()
    run_all(client, Grid(POINTS[:3]), experiments, monkeypatch)
    report = run_all(client, Grid(POINTS), experiments, monkeypatch)
    assert len(experiments.runs) == len(POINTS)
    assert report.metrics.keys() == set(map(name_of, POINTS))


def test_one_that_fails_stops_no_other_and_is_run_again(client, monkeypatch, capsys):
    experiments = Experiments("latent_dim=3")
    report = run_all(client, Grid(POINTS), experiments, monkeypatch)
    assert report.failures == [Outcome("latent_dim=3", "train: the reason", "host:file")]
    assert len(report.metrics) == len(POINTS) - 1
    assert "latent_dim=3 failed: train: the reason" in capsys.readouterr().err
    experiments.broken = ()
    assert run_all(client, Grid(POINTS), experiments, monkeypatch).failures == []
    assert len(experiments.runs) == len(POINTS) + 1


def test_what_a_task_raises_is_a_failure_of_its_experiment(client, monkeypatch):
    experiments = Experiments()
    monkeypatch.setattr(experiments, "run", lambda *arguments: 1 / 0)
    [failure] = run_all(client, Grid(POINTS[:1]), experiments, monkeypatch).failures
    assert failure.error == "ZeroDivisionError: division by zero"


def test_what_has_finished_meanwhile_is_fetched_at_once(client, monkeypatch):
    experiments, calls = Experiments(), []

    def fetch(names: list[str]) -> None:
        while len(experiments.there) < len(POINTS):
            time.sleep(0.01)
        time.sleep(0.2)  # for the last one's word to come
        calls.append(names)

    monkeypatch.setattr(experiments, "fetch", fetch)
    report = run_all(client, Grid(POINTS), experiments, monkeypatch)
    fetched = [name for names in calls for name in names]
    assert sorted(fetched) == sorted(report.metrics) == sorted(map(name_of, POINTS))
    assert len(calls) < len(POINTS)


def test_the_bar_shows_the_best_so_far(client, monkeypatch, capsys):
    run_all(client, Grid(POINTS), Experiments(), monkeypatch)
    assert "4/4" in capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    run_all(client, Grid(POINTS), Experiments(), monkeypatch)
    assert "best nll 2: latent_dim=8" in capsys.readouterr().err


def test_the_best_is_the_highest_or_the_lowest_of_what_has_a_value():
    values = {"a": 1.0, "b": None, "c": 3.0}
    assert Goal("nll", maximize=False).best(values) == ("a", 1.0)
    assert Goal("elbo", maximize=True).best(values) == ("c", 3.0)
    assert NLL.best({"b": None}) is None


@pytest.mark.parametrize("jobs", [1, 3])
def test_as_many_experiments_run_at_once_as_were_asked_for(jobs):
    with connect(None, jobs) as client:
        assert driver.slots(client) == jobs


def test_a_scheduler_that_is_gone_is_told_in_one_line(monkeypatch):
    def silent() -> None:
        raise OSError("Timed out trying to connect to tcp://192.0.2.1:8786 after 30 s")

    with connect(None, jobs=1) as client:
        monkeypatch.setattr(client, "nthreads", silent)
        with pytest.raises(UserError, match="the scheduler does not answer any more; start it again"):
            drive(client, Grid(POINTS), Experiments(), SWEEP, NLL)


def test_no_scheduler_at_the_address_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr("sweep.driver.PATIENCE_S", 0.5)
    with pytest.raises(UserError, match=r"no scheduler answers at tcp://127\.0\.0\.1:9"):
        connect("tcp://127.0.0.1:9", jobs=1)


@pytest.fixture
def command(tmp_path, monkeypatch) -> Callable[..., tuple[int, "driver.Plan"]]:
    """The whole command on a folder with a params.yaml, without git and Dask: its exit status and its plan."""
    shutil.copy(PARAMS, tmp_path)
    seen: dict[str, object] = {}

    def remember(client, plan, repository, sweep, goal):
        seen["plan"] = plan
        return driver.Report({"a": seen["metrics"]}, seen.get("failures", []))

    repository = SimpleNamespace(remote=".", commit=SWEEP.commit, sweep=lambda: SWEEP)
    monkeypatch.setattr(main, "ROOT", tmp_path)
    monkeypatch.setattr("sweep.repository.Repository", lambda root, remote: repository)
    monkeypatch.setattr(driver, "connect", lambda address, jobs: nullcontext())
    monkeypatch.setattr(driver, "drive", remember)

    def call(*argv: str, failures: tuple[Outcome, ...] = (), **metrics: float):
        seen["failures"], seen["metrics"] = list(failures), metrics or {"nll": 1.5}
        return main.sweep(main.parse(argv)), seen["plan"]

    return call


def test_the_command_runs_a_grid(command, capsys):
    status, plan = command("-S", "train.seed=1,2", "-S", "model.latent_dim=2,3")
    assert (status, plan.total) == (0, 4)
    printed = capsys.readouterr().out
    assert "| a          | 1.5 |" in printed
    assert "dvc exp apply a" in printed


def test_the_command_lets_optuna_choose(command):
    status, plan = command("--suggest", "3", "-S", "train.learning_rate=1e-4..1e-2", "-S", "model.latent_dim=2,3")
    assert (status, plan.total) == (0, 3)
    assert [point["model.latent_dim"] in (2, 3) for point in plan.points()] == [True] * 3


def test_the_command_reports_failures_and_says_so_by_its_status(command, capsys):
    status, _ = command("-S", "train.seed=1", failures=(Outcome("b", "train: the reason", "host:file"),))
    assert status == 1
    assert "b failed: train: the reason (log: host:file)" in capsys.readouterr().err


def test_a_metric_that_no_experiment_has_is_told_with_those_that_there_are(command, capsys):
    command("-S", "train.seed=1", "--metric", "nil")
    assert "no experiment has the metric nil; known are nll" in capsys.readouterr().err


def test_a_binarised_sweep_is_compared_by_the_names_that_its_numbers_have(command, capsys):
    command("-S", "data.binarize=dynamic", nll_dynamic=91.5, elbo_dynamic=-95.5)
    printed = capsys.readouterr()
    assert "| a          |        91.5 |        -95.5 |" in printed.out
    assert "no experiment has the metric" not in printed.err


def test_several_values_of_binarize_need_a_metric(command, capsys):
    several = ("-S", "data.binarize=none,static")
    with pytest.raises(UserError, match="--metric nll"):
        command(*several)
    command(*several, "--metric", "elbo_static", nll_static=91.5, elbo_static=-95.5)
    columns = [column.strip() for column in capsys.readouterr().out.splitlines()[0].split("|")]
    assert columns[2:6] == ["elbo_static", "nll", "nll_static", "elbo"]


@pytest.mark.parametrize(
    ("argument", "jobs"),
    [("train.seed=1,2", 8), ("train.threads=1,2", 4), ("train.devices=2,4", 2), ("train.threads=16", 1)],
)
def test_as_many_experiments_run_at_once_as_the_cores_are_enough_for(command, monkeypatch, argument, jobs):
    seen = []
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(driver, "connect", lambda address, jobs: nullcontext(seen.append(jobs)))
    command("-S", argument)
    assert seen == [jobs]


def test_one_sweep_at_a_time_runs_in_a_folder(command, tmp_path):
    command("-S", "train.seed=1")
    with FileLock(tmp_path / ".dvc/tmp/sweep/driver.lock"), pytest.raises(UserError, match="another sweep"):
        command("-S", "train.seed=1")


def suggestions(storage: Path, total: int, driver: str = "here") -> Suggestions:
    return Suggestions(SPACE, total, NLL, f"sqlite:///{storage}", SWEEP.commit, driver)


def trials(storage: Path) -> list["optuna.trial.FrozenTrial"]:
    [name] = optuna.get_all_study_names(f"sqlite:///{storage}")
    return optuna.load_study(study_name=name, storage=f"sqlite:///{storage}").get_trials()


def test_optuna_is_asked_for_no_more_points_than_can_run_at_once(client, monkeypatch):
    class Twice(Grid):
        all_at_once = False
        open = 0

        def points(self):
            for point in POINTS:
                for _ in range(2):  # as Optuna does in a space that is smaller than the cluster
                    self.open += 1
                    assert self.open <= 2  # jobs
                    yield point

        def done(self, point, value):
            self.open -= 1

    experiments = Experiments()
    report = run_all(client, Twice(POINTS), experiments, monkeypatch)
    assert sorted(experiments.runs) == sorted(report.metrics) == sorted(map(name_of, POINTS))


def test_optuna_chooses_as_many_points_as_asked_for(client, monkeypatch, tmp_path):
    storage, experiments = tmp_path / "optuna.db", Experiments()
    report = run_all(client, suggestions(storage, 5), experiments, monkeypatch)
    found = trials(storage)
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 5
    for trial in found:
        assert trial.value == abs(10 - trial.params["model.latent_dim"])
        assert trial.params["model.hidden_dims"] in ("[8]", "[4,4]")
    assert report.metrics == experiments.there


def test_the_same_command_again_runs_nothing_and_a_larger_number_only_the_rest(client, monkeypatch, tmp_path):
    storage, experiments = tmp_path / "optuna.db", Experiments()
    run_all(client, suggestions(storage, 4), experiments, monkeypatch)
    before = len(experiments.runs)
    report = run_all(client, suggestions(storage, 4), experiments, monkeypatch)
    assert len(experiments.runs) == before == len(report.metrics)
    run_all(client, suggestions(storage, 6), experiments, monkeypatch)
    assert len(trials(storage)) == 6
    assert len(experiments.runs) == before + 2


def test_what_a_dead_driver_left_running_has_failed_and_its_point_comes_first(client, monkeypatch, tmp_path):
    storage = tmp_path / "optuna.db"
    dead = suggestions(storage, 3)
    begun = next(dead.points())
    assert [trial.state for trial in trials(storage)] == [TrialState.RUNNING]
    experiments = Experiments()
    run_all(client, suggestions(storage, 3), experiments, monkeypatch)
    assert [trial.state for trial in trials(storage)] == [TrialState.FAIL] + [TrialState.COMPLETE] * 3
    assert experiments.runs[0] == name_of(begun)


def test_a_driver_that_dies_as_it_asks_leaves_no_trial_running_for_ever(monkeypatch, tmp_path):
    points = suggestions(tmp_path / "study.db", 4).points()
    monkeypatch.setattr(optuna.trial.Trial, "set_user_attr", lambda *arguments: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        next(points)
    assert [trial.state for trial in trials(tmp_path / "study.db")] == [TrialState.RUNNING]

    suggestions(tmp_path / "study.db", 4)

    assert [trial.state for trial in trials(tmp_path / "study.db")] == [TrialState.FAIL, TrialState.WAITING]


def test_what_a_driver_elsewhere_runs_stays_its_own(client, monkeypatch, tmp_path):
    storage = tmp_path / "optuna.db"
    elsewhere = suggestions(storage, 1, "elsewhere")
    point = next(elsewhere.points())
    run_all(client, suggestions(storage, 1), Experiments(), monkeypatch)
    elsewhere.done(point, 3.0)
    assert [trial.state for trial in trials(storage)] == [TrialState.COMPLETE] * 2
    assert trials(storage)[0].value == 3


def test_a_failed_experiment_is_told_to_optuna_as_failed(client, monkeypatch, tmp_path):
    storage, experiments = tmp_path / "optuna.db", Experiments()
    first = name_of(next(suggestions(tmp_path / "other.db", 1).points()))  # the sampler's seed is fixed
    experiments.broken = (first,)
    report = run_all(client, suggestions(storage, 1), experiments, monkeypatch)
    assert [failure.name for failure in report.failures] == [first]
    assert [trial.state for trial in trials(storage)] == [TrialState.FAIL]


def test_drivers_at_one_study_do_not_ask_for_the_same_points(tmp_path):
    next(suggestions(tmp_path / "optuna.db", 20).points())
    one, other = (suggestions(tmp_path / "optuna.db", 20, driver) for driver in ("there", "elsewhere"))

    assert [*islice(one.points(), 3)] != [*islice(other.points(), 3)]


def test_a_storage_that_does_not_open_is_told_without_its_password():
    with pytest.raises(UserError, match=r"--storage: .* does not open") as told:
        Suggestions(SPACE, 1, NLL, "postgresql://ada:secret@127.0.0.1:9/x", SWEEP.commit, "here")
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)
