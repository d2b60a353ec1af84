"""Every fault that is injected, what is to happen then, and what is lost."""

from collections.abc import Callable
from typing import NamedTuple

from tests.faults import kills
from tests.faults.lab import Lab


class Fault(NamedTuple):
    """Something that goes wrong. After ``run`` one plain `dvc repro` has to put everything right (oracle.py)."""

    name: str
    inject: str  # how the test brings it about
    expect: str  # what you see
    run: Callable[[Lab], None]
    lost: str = "nothing"
    quick: bool = False  # a plain `make test` takes its sample from these


CHECKPOINTS = "mnist_vae.training.checkpoints:AtomicCheckpointIO.save_checkpoint"
REGISTRY = "mlflow.tracking.client:MlflowClient"

KILLS = [
    Fault("a training is killed", "30 times, at random moments", "resumes", kills.storm("stage", 30, alone=True)),
    Fault("storm stage", "6 times, at random moments", "resumes", kills.storm("stage", 6)),
    Fault("storm sender", "6 times, at random moments", "resumes", kills.storm("sender", 6)),
    Fault("storm dvc", "6 times, at random moments", "resumes", kills.storm("dvc", 6)),
    Fault("storm group", "6 times, at random moments", "resumes", kills.storm("group", 6)),
    Fault("killed mid-step","","",kills.in_epoch("train","mnist_vae.training.module:VAETraining.manual_backward",call=1500,after=True)),
    Fault("killed before ckpt","","",kills.in_epoch("train",CHECKPOINTS,call=3)),
    Fault("killed before ckpt rename","","",kills.in_epoch("train","pathlib:Path.replace",call=2,given="last.ckpt")),
    Fault("killed after ckpt rename","","",kills.in_epoch("train","pathlib:Path.replace",call=2,given="last.ckpt",after=True)),
    Fault("SIGTERM","","",kills.asked_to_end("SIGTERM")),
    Fault("SIGHUP","","",kills.asked_to_end("SIGHUP")),
    Fault("SIGINT","","",kills.asked_to_end("SIGINT")),
]

FAULTS = [*KILLS]
