"""Many short runs at once against one tracking store, told by as many workspaces, each with a sender as stages have it.

python -m benchmarks.tracking WORKSPACE RUNS EPOCHS    one workspace, started by ``storm``
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mnist_vae.tracking.journal import Begin, End, File, Journal, Metrics, Tags
from mnist_vae.tracking.process import process_name
from tools.clone import ROOT, environment

TIME_LIMIT_S = 1800
SENDER = (sys.executable, "-m", "mnist_vae.tracking.sender")
METRICS = ("loss", "kld", "reconstruction", "learning_rate")  # of an epoch


@dataclass(frozen=True)
class Storm:
    """What became of it."""

    records: int  # in all journals
    metrics: int  # single values
    told_per_second: float  # records on the disk, of the slowest journal
    sent_per_second: float  # records that the store received, from all
    seconds: float  # until the store had all


def storm(folder: Path, variables: dict[str, str], workspaces: int, runs: int, epochs: int) -> Storm:
    """``runs`` short runs in each of some workspaces in ``folder``, all at once, to the store of ``variables``.

    Raises:
        RuntimeError: a run is not there, is there twice, or has something that is not its own.
    """
    paths = [folder / f"workspace-{number}" for number in range(workspaces)]
    for path in paths:
        path.mkdir(parents=True)
    paths_of_code = os.pathsep.join(map(str, (ROOT / "src", ROOT)))
    variables = {"PYTHONPATH": paths_of_code, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", **variables}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tracking", str(path), str(runs), str(epochs)],
            cwd=path,
            env=environment(path, **variables),
            stdout=subprocess.PIPE,
            text=True,
        )
        for path in paths
    ]
    told = [json.loads(process.communicate(timeout=TIME_LIMIT_S)[0]) for process in processes]
    ended = time.time()
    left = [
        subprocess.Popen([*SENDER, str(path)], env=environment(path, **variables), stdout=subprocess.DEVNULL)
        for path in paths  # what a store has refused for a while
    ]
    if any(process.wait(timeout=TIME_LIMIT_S) for process in left):
        raise RuntimeError("not everything was sent")
    command = [sys.executable, "-m", "benchmarks.tracking", str(folder), str(workspaces * runs), str(epochs), "check"]
    subprocess.run(command, env=environment(folder, **variables), check=True)
    records = sum(one["records"] for one in told)
    seconds = ended - min(one["started"] for one in told)
    return Storm(
        records=records,
        metrics=workspaces * (runs - 1) * epochs * len(METRICS),
        told_per_second=min(one["records"] / one["seconds"] for one in told),
        sent_per_second=records / seconds,
        seconds=seconds,
    )


def shared_database(folder: Path) -> dict[str, str]:
    """A new SQLite database for the workers of one machine; the variable that leads to it."""
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'shared.db'}"}
    program = "from pathlib import Path; from mnist_vae.tracking.store import Store; Store(Path.cwd())"
    env = environment(folder, PYTHONPATH=str(ROOT / "src"), **variables)
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=env, check=True)
    return variables


def fingerprint(workspace: Path, number: int) -> str:
    """The name of a run's training, which says whose it is."""
    return f"{int(workspace.name.rpartition('-')[2]) + 1:08x}{number:08x}"


def value(training: str, metric: str, epoch: int) -> float:
    """A number that no other run has at this place."""
    return int(training, 16) % 9_999_991 + METRICS.index(metric) / 8 + epoch / 1024


def work(workspace: Path, runs: int, epochs: int) -> dict[str, float]:
    """Tell a sender of runs as fast as it goes, and wait until it has sent them.

    How long it took to tell them, and how many records they were, is counted from the second run on, when the sender
    has loaded MLflow and sent the first.
    """
    process = process_name()
    sender = subprocess.Popen(
        [*SENDER, str(workspace), "render", process], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert sender.stdin is not None
    started = begun = time.time()
    for number in range(runs):
        training = fingerprint(workspace, number)
        journal = Journal(workspace, training)
        begin = {"key": "", "name": training, "tags": {"workspace": workspace.name}, "params": {"train.seed": training}}
        journal.append(Begin(stage="train", process=process, **begin))
        sender.stdin.write(f"{training}\n")
        sender.stdin.flush()
        for epoch in range(1, epochs + 1):
            journal.append(Metrics(values={name: value(training, name, epoch) for name in METRICS}, step=epoch))
        journal.append(Tags(tags={"mine": training}))
        journal.append(File(folder="plots", payload=journal.keep_bytes("losses.csv", training.encode())))
        journal.append(End(stage="train", process=process, status="FINISHED"))
        if number == 0:
            while not list(journal.folder.glob("sent-*.json")):
                if sender.poll() is not None or time.time() > begun + TIME_LIMIT_S:
                    raise RuntimeError("the sender has sent nothing")
                time.sleep(0.05)
            started = time.time()
    seconds = time.time() - started
    sender.stdin.close()
    sender.wait(timeout=TIME_LIMIT_S)
    return {"started": started, "seconds": seconds, "records": (runs - 1) * (epochs + 4)}


def check(count: int, epochs: int) -> None:
    """Compare every run of the store with what it should be.

    Raises:
        RuntimeError: which run differs, and how.
    """
    from mlflow.artifacts import load_text

    from mnist_vae.tracking.store import MlflowClient

    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, "tags.workspace LIKE 'workspace-%'", max_results=10_000)
    names = [run.info.run_name for run in found]
    if len(found) != count or len(set(names)) != count:
        raise RuntimeError(f"{len(found)} runs of {len(set(names))} names, not {count}")
    for run in found:
        name = str(run.info.run_name)
        history = {metric: client.get_metric_history(run.info.run_id, metric) for metric in METRICS}
        told = {metric: [(point.step, point.value) for point in points] for metric, points in history.items()}
        right = {metric: [(e, value(name, metric, e)) for e in range(1, epochs + 1)] for metric in METRICS}
        about = (run.info.status, run.data.tags["mine"], run.data.tags["fingerprint"], run.data.params["train.seed"])
        content = load_text(f"{run.info.artifact_uri}/plots/losses.csv")
        if told != right or about != ("FINISHED", name, name, name) or content != name:
            raise RuntimeError(f"run {name}: {about}, {content!r}, {told}")


def main() -> None:
    workspace, runs, epochs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        check(runs, epochs)
    else:
        print(json.dumps(work(workspace, runs, epochs)))


if __name__ == "__main__":
    main()
