"""The command line of a sweep: see ``python -m sweep --help``."""

import argparse
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mnist_vae.params import Params
    from sweep.driver import Goal, Report
    from sweep.repository import Repository
    from sweep.space import Space

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("nll", "elbo", "kld", "active_units", "knn_accuracy")  # as in `make table`, of each data.binarize
MAXIMIZED = ("elbo", "accuracy", "precision", "recall", "density", "coverage", "active_units")
DESCRIPTION = """\
Run every combination of parameter values as a DVC experiment on the last commit, as many at once as there are cores,
or on the Dask cluster at DASK_SCHEDULER_ADDRESS. What was run before is not run again, so the same command goes on
after an interruption, whatever was interrupted.

  python -m sweep -S model.latent_dim=2,5,10,20 -S train.seed=1,2,3
  python -m sweep -S 'model.hidden_dims=[400],[200,200]'
  python -m sweep --suggest 20 -S train.learning_rate=1e-4..1e-2 -S model.latent_dim=2..20
"""


def main() -> None:
    arguments = parse(sys.argv[1:])
    needed = ["distributed", *(["optuna"] if arguments.suggest else [])]
    if any(importlib.util.find_spec(package) is None for package in needed):
        sys.exit("sweep: needs Dask and Optuna, which are an extra: pip install -c requirements.lock '.[sweep]'")
    from mnist_vae.errors import UserError

    try:
        sys.exit(sweep(arguments))
    except UserError as error:
        sys.exit(f"sweep: {error}")
    except KeyboardInterrupt:
        print("\nsweep: stopped; the same command goes on with what is missing", file=sys.stderr)
        os._exit(130)  # at once: what runs here ends with this process, and a cluster's workers end what they began


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; argparse leaves with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m sweep", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "-S",
        "--set-param",
        action="append",
        required=True,
        metavar="NAME=VALUES",
        help="values with commas between them, in the grammar of `dvc exp run -S`; with --suggest also a range "
        "LOW..HIGH, of whole numbers if the parameter is, on a log scale if HIGH is ten times LOW or more",
    )
    add("--suggest", type=count, metavar="N", help="let Optuna choose N points instead of running a grid")
    add("--storage", metavar="URL", help="Optuna's database (default: a file in .dvc/tmp/sweep)")
    add(
        "--metric",
        help="of metrics/evaluate.json, to compare by (default: nll, nll_static or nll_dynamic)",
    )
    add("--direction", choices=["minimize", "maximize"], help="default: what is better for the metric")
    add("--jobs", type=count, help="experiments at once on this machine (default: cores / (threads × devices))")
    add(
        "--git-remote",
        metavar="REMOTE",
        help="where workers clone from and push to (default: this folder; with DASK_SCHEDULER_ADDRESS origin, and `.` "
        "there says that the workers see this folder under the same path)",
    )
    return parser.parse_args(argv)


def count(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above zero")
    return int(text)


def sweep(arguments: argparse.Namespace) -> int:
    """Everything; the exit status."""
    from filelock import FileLock, Timeout

    from mnist_vae.data.binarization import metric_name
    from mnist_vae.errors import UserError
    from mnist_vae.params import load_params
    from sweep import driver, space
    from sweep.repository import HERE, Repository

    params = load_params(ROOT / "params.yaml")
    asked_for = space.read_space(arguments.set_param, ROOT / "params.yaml", ranges=bool(arguments.suggest))
    settings = list(asked_for.get("data.binarize", [params.data.binarize]))
    shown = [metric_name(name, setting) for name in SHOWN for setting in settings]
    if len(settings) > 1 and not arguments.metric:
        raise UserError(
            "the values of data.binarize have metrics of different names, which cannot be compared: name one by "
            f"--metric, as --metric {shown[0]}"
        )
    metric = arguments.metric or shown[0]
    goal = driver.Goal(metric, direction(metric, arguments.direction) == "maximize")
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    repository = Repository(ROOT, arguments.git_remote or ("origin" if address else HERE))
    common = repository.sweep()
    folder = ROOT / ".dvc" / "tmp" / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    if not address:
        common = common._replace(folder=str(folder))
    try:
        with FileLock(folder / "driver.lock", timeout=0):
            plan: driver.Plan
            if arguments.suggest:
                from sweep.suggest import Suggestions

                storage = arguments.storage or f"sqlite:///{folder / 'optuna.db'}"
                plan = Suggestions(
                    asked_for, arguments.suggest, goal, storage, repository.commit, f"{socket.gethostname()}:{ROOT}"
                )
            else:
                plan = driver.Grid(list(space.grid(asked_for)))
            jobs = arguments.jobs or jobs_here(params, asked_for)
            with driver.connect(address, jobs) as client:
                report = driver.drive(client, plan, repository, common, goal)
    except Timeout as error:
        raise UserError("another sweep runs in this folder; wait for its end, or end it") from error
    show(report, goal, shown, repository)
    return int(bool(report.failures))


def jobs_here(params: "Params", asked_for: "Space") -> int:
    """How many experiments this machine's cores are enough for at once, with the largest values of the sweep."""
    threads = max(asked_for.get("train.threads", [params.train.threads]))
    devices = max(asked_for.get("train.devices", [params.train.devices]))  # a process each
    return max(1, (os.cpu_count() or 1) // int(threads * devices))


def direction(metric: str, given: str | None) -> str:
    """Which way a metric gets better: as said, or as its name tells."""
    return given or ("maximize" if any(word in metric for word in MAXIMIZED) else "minimize")


def show(report: "Report", goal: "Goal", shown: Sequence[str], repository: "Repository") -> None:
    """The table, the failures, and what to do next."""
    from sweep.repository import HERE
    from tools.table import table

    columns = [goal.metric, *(name for name in shown if name != goal.metric)]
    order = sorted(report.metrics, key=lambda name: rank(report.metrics[name], goal))
    if order:
        rows = [[name, *(number(report.metrics[name].get(column)) for column in columns)] for name in order]
        print(table(["Experiment", *columns], rows, numbers=True))
    if order and goal.best({name: goal.value(report.metrics[name]) for name in order}) is None:
        numbers = [name for name, value in report.metrics[order[0]].items() if isinstance(value, int | float)]
        print(f"sweep: no experiment has the metric {goal.metric}; known are {', '.join(numbers)}", file=sys.stderr)
    for failure in report.failures:
        print(f"{failure.name} failed: {failure.error} (log: {failure.log})", file=sys.stderr)
    if order:
        fetch = "" if repository.remote == HERE else "; then `dvc pull`, its data from the DVC remote"
        print(
            f"Next: `dvc exp show` or `make table`, all of them; `dvc exp apply {order[0]}`, the best into the "
            f"workspace{fetch}."
        )


def rank(metrics: dict[str, object], goal: "Goal") -> float:
    """Where an experiment stands in the table: the best first, without a value last."""
    value = goal.value(metrics)
    return float("inf") if value is None else -value if goal.maximize else value


def number(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else "–"


if __name__ == "__main__":
    main()
