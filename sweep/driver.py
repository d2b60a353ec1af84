"""Hand points to Dask, show how far they are, and say at the end what came of them."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import cloudpickle
from distributed import Client, Future, LocalCluster, as_completed
from tqdm import tqdm

from mnist_vae.errors import UserError
from sweep import slot
from sweep.repository import Repository
from sweep.slot import Outcome, Sweep
from sweep.space import Point, name_of, overrides

PATIENCE_S = 30  # for a scheduler to answer

Run = Callable[[Sweep, str, list[str]], Outcome]


class Goal(NamedTuple):
    """What experiments are compared by."""

    metric: str
    maximize: bool

    def value(self, metrics: Mapping[str, Any]) -> float | None:
        found = metrics.get(self.metric)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None

    def best(self, values: Mapping[str, float | None]) -> tuple[str, float] | None:
        """The name and value of the best experiment that has one."""
        known = [(name, value) for name, value in values.items() if value is not None]
        return (max if self.maximize else min)(known, key=lambda item: item[1], default=None)


class Plan(Protocol):
    """Which points are to be run."""

    total: int

    def points(self) -> Iterator[Point]:
        """The points, one by one, as there is room for them."""

    def done(self, point: Point, value: float | None) -> None:
        """A point has its value, None where it failed."""

    all_at_once: bool  # or only as many as can run, because the next point depends on the last values


class Grid:
    """Every combination, known from the start."""

    all_at_once = True

    def __init__(self, points: list[Point]) -> None:
        self._points, self.total = points, len(points)

    def points(self) -> Iterator[Point]:
        return iter(self._points)

    def done(self, point: Point, value: float | None) -> None:
        pass


class Report(NamedTuple):
    """What a sweep left: the metrics of each experiment, and the failures."""

    metrics: dict[str, dict[str, Any]]
    failures: list[Outcome]


def connect(address: str | None, jobs: int) -> Client:
    """The cluster at an address, or ``jobs`` threads of this process, which are enough to wait for experiments.

    Raises:
        UserError: no scheduler answers at the address.
    """
    if not address:
        here = "127.0.0.1:0"  # for Dask's page about itself, which cannot be left out
        cluster = LocalCluster(
            n_workers=1, threads_per_worker=jobs, processes=False, dashboard_address=here, memory_limit=0
        )
        return Client(cluster)
    try:
        return Client(address, timeout=PATIENCE_S)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"DASK_SCHEDULER_ADDRESS: no scheduler answers at {address}; start it, or unset the variable for this "
            "machine alone"
        ) from error


def drive(
    client: Client, plan: Plan, repository: Repository, sweep: Sweep, goal: Goal, run: Run = slot.run_experiment
) -> Report:
    """Run what is missing, each as soon as there is room for it; one that fails stops no other."""
    cloudpickle.register_pickle_by_value(slot)
    report = Report({}, [])
    values: dict[str, float | None] = {}
    running: dict[Future[Any], str] = {}
    waiting: dict[str, list[Point]] = {}  # for the experiment of this name; Optuna may choose a point twice
    existing = repository.existing()
    ahead = plan.points()
    completed = as_completed(raise_errors=False)
    if not slots(client):
        print("No worker has joined the scheduler yet; experiments start when one does.", file=sys.stderr)
    with tqdm(total=plan.total, unit="experiment", dynamic_ncols=True) as progress:

        def conclude(point: Point, outcome: Outcome) -> None:
            name = outcome.name
            if not outcome.error:
                report.metrics[name] = repository.metrics(name)
                values[name] = goal.value(report.metrics[name])
            else:
                report.failures.append(outcome)
                progress.write(f"{name} failed: {outcome.error}", file=sys.stderr)
            plan.done(point, values.get(name))
            progress.update()
            if best := goal.best(values):
                progress.set_postfix_str(f"best {goal.metric} {best[1]:.5g}: {best[0]}")

        def fill() -> None:
            """Submit points until the workers have enough to do."""
            while plan.all_at_once or sum(map(len, waiting.values())) < max(1, slots(client)):
                point = next(ahead, None)
                if point is None:
                    return
                name = name_of(point)
                if name in existing:
                    conclude(point, Outcome(name))
                elif name in waiting:
                    waiting[name].append(point)
                else:
                    task = task_of(run, sweep, name, overrides(point))
                    future = client.submit(task, key=f"{sweep.commit} {name}", pure=False)
                    running[future], waiting[name] = name, [point]
                    completed.add(future)

        fill()
        while running:
            ended = [outcome_of(future, running.pop(future)) for future in completed.next_batch()]
            repository.fetch([outcome.name for outcome in ended if not outcome.error])
            for outcome in ended:
                if not outcome.error:
                    existing.add(outcome.name)
                for point in waiting.pop(outcome.name):
                    conclude(point, outcome)
            fill()
    return report


def task_of(run: Run, sweep: Sweep, name: str, settings: list[str]) -> Callable[[], tuple[str, ...]]:
    """An experiment as a function that travels with all its code.

    Dask falls back to cloudpickle for what pickle refuses, as a function without a name; what pickle accepts, it sends
    as the name of a module, which neither the scheduler nor a worker has.
    """
    return lambda: tuple(run(sweep, name, settings))


def slots(client: Client) -> int:
    """How many experiments the cluster's workers can run at once at this moment.

    Raises:
        UserError: the scheduler is gone.
    """
    try:
        return sum(client.nthreads().values())
    except OSError as error:
        raise UserError(
            "the scheduler does not answer any more; start it again, and the same command goes on with what is missing"
        ) from error


def outcome_of(future: Future[Any], name: str) -> Outcome:
    """What a worker says of an experiment, or what Dask says of the worker; Dask forgets it then."""
    try:
        return Outcome(*future.result())
    except Exception as error:  # KilledWorker, a lost scheduler, whatever a task raises
        return Outcome(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", "the worker's own log")
    finally:
        future.release()
