"""Trainings that go wrong by themselves, and limits of the system."""

from collections.abc import Callable
from functools import partial

from tests.faults.lab import Lab
from tests.pipeline import set_params


def diverges(lab: Lab) -> None:
    lab.begin("finished")
    set_params(lab.clone, {"train.learning_rate": 1e5})
    said = lab.fail().says("train: training diverged at epoch", "lower train.learning_rate")
    assert "nan" not in said.text.lower()
    lab.wait_for_quiet()
    [(status,)] = lab.sql(
        "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE tags.key = 'reason' AND tags.value LIKE ?",
        "train: training diverged at epoch%",
    )
    assert status == "FAILED"
    set_params(lab.clone, {"train.learning_rate": 1e-3})
    lab.other_trainings = 1


def collapses(lab: Lab) -> None:
    lab.begin("finished")
    set_params(lab.clone, {"train.kl_weight": 1000.0})
    lab.repro().says("evaluate: WARNING")
    assert "the posterior has collapsed" in (lab.clone / "metrics/report.md").read_text()
    assert len(lab.sql("SELECT value FROM tags WHERE key = 'warning'")) == 1
    set_params(lab.clone, {"train.kl_weight": 1.0})
    lab.other_trainings = 1


def limited(limit: str, message: str = "") -> Callable[[Lab], None]:
    """A limit of the shell, as `ulimit -f 8`, for `dvc repro train`."""
    return partial(_limited, limit=limit, message=message)


def _limited(lab: Lab, limit: str, message: str) -> None:
    lab.begin("downloaded")
    said = lab.run("bash", "-c", f"ulimit {limit} && exec dvc repro train")
    said.failed().says(message)


def output_closed(lab: Lab) -> None:
    """`dvc repro train | head -1`: nobody reads what is printed."""
    lab.begin("downloaded")
    lab.run("bash", "-c", "dvc repro train 2>&1 | head -1")
    lab.wait_for_quiet(120)


def output_full(lab: Lab) -> None:
    """What is printed goes to a disk that is full."""
    lab.begin("downloaded")
    lab.run("bash", "-c", "dvc repro train >/dev/full 2>&1")
