"""Several processes in one workspace at once."""

import subprocess
import sys
import time

from tests.faults.lab import Lab
from tests.faults.tracking import Server
from tools.deployment import free_port


def two_repros(lab: Lab) -> None:
    """The second one is refused, in words, and the first one goes on."""
    lab.begin("downloaded")
    first = lab.start("dvc", "repro")
    lab.wait_for_epoch(1)
    lab.fail()
    first.wait().succeeded()


def two_repros_at_once(lab: Lab) -> None:
    """Started in the same moment, three of them, several times."""
    lab.begin("downloaded")
    commands = [lab.start("dvc", "repro") for _ in range(3)]
    ends = [command.wait() for command in commands]
    assert [end.status for end in ends].count(0) >= 1


def stage_by_hand(lab: Lab) -> None:
    """A stage started by hand waits for the one that works."""
    lab.begin("downloaded")
    first = lab.start("dvc", "repro", "train")
    lab.wait_for_epoch(1)
    second = lab.start(*lab.stage_command("train"))
    first.wait().succeeded()
    second.wait().succeeded().says("waiting for another stage")


def page_while_fresh(lab: Lab) -> None:
    """`mlflow ui` makes the store at the moment when a stage does."""
    lab.begin("downloaded")
    port = free_port()
    ui = ["mlflow", "ui", "--workers", "1", "--port", str(port), "--backend-store-uri", "sqlite:///mlflow.db"]
    page = lab.start(sys.executable, "-m", *ui)
    training = lab.start("dvc", "repro", "train")
    training.wait().succeeded()
    page.end()


def eight_workers(lab: Lab) -> None:
    """Eight experiments at once, in eight processes, on a store that is not there yet."""
    lab.begin("downloaded")
    for seed in range(2, 10):
        lab.run("dvc", "exp", "run", "--queue", "-S", f"train.seed={seed}", "-S", "train.epochs=1").succeeded()
    lab.run("dvc", "queue", "start", "--jobs", "8").succeeded()
    deadline = time.monotonic() + 600
    while (status := lab.run("dvc", "queue", "status").text) and ("Running" in status or "Queued" in status):
        assert time.monotonic() < deadline, status
        time.sleep(3)
    assert status.count("Success") == 8, status
    lab.wait_for_quiet(60)
    runs = lab.sql("SELECT status FROM runs WHERE lifecycle_stage = 'active'")
    assert runs == [("FINISHED",)] * 8, runs
    lab.other_trainings = 8


def two_clones_one_server(lab: Lab) -> None:
    """The same training in two clones at once, told to one server: one run."""
    lab.begin("downloaded")
    server = Server(lab)
    server.start()
    other = lab.folder / "other"
    subprocess.run(["cp", "--archive", lab.clone, other], check=True)
    lab.tellers = 2
    first = lab.start("dvc", "repro", "train")
    here, lab.clone = lab.clone, other
    second = lab.start("dvc", "repro", "train")
    second.wait().succeeded()
    lab.wait_for_quiet()
    lab.clone = here
    first.wait().succeeded()


def sync_meanwhile(lab: Lab) -> None:
    """`make sync` again and again while a training is told."""
    lab.begin("downloaded")
    training = lab.start("dvc", "repro", "train")
    lab.wait_for_epoch(1)
    while training.process.poll() is None:
        lab.sync()
    training.wait().succeeded()
