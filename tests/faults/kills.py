"""Processes that are killed: at random moments, and at named points."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import psutil

from tests.faults.lab import EPOCHS, Lab, State
from tests.faults.oracle import assert_outputs_equal, assert_trained

Victim = Literal["stage", "sender", "dvc", "group"]
GRACE_S = 20  # within which a stage ends after a signal, or after its dvc
SENDER = ("mnist_vae.tracking.sender", "train")
BEFORE: dict[str, State] = {"download": "fresh", "train": "downloaded"}  # the state in which a stage is to run


# at named points


def at(stage: str, place: str, **rule: Any) -> Callable[[Lab], None]:
    """Kill the process that makes a call while a stage runs: the stage or its sender."""
    return partial(_at, stage=stage, rule={"at": place, "do": "SIGKILL", **rule})


def _at(lab: Lab, stage: str, rule: dict[str, Any]) -> None:
    lab.begin(BEFORE.get(stage, "trained"))
    lab.run("dvc", "repro", stage, env=lab.rules(rule))
    lab.assert_interfered()


def in_epoch(stage: str, place: str, **rule: Any) -> Callable[[Lab], None]:
    """The same for a training that has epochs behind it: the next one resumes."""

    def run(lab: Lab) -> None:
        _at(lab, stage, {"at": place, "do": "SIGKILL", **rule})
        lab.next_says = ("resuming after epoch",)

    return run


# at random moments


def storm(victim: Victim, kills: int, alone: bool = False) -> Callable[[Lab], None]:
    """Kill a training again and again, each time at a random moment, from its first import to its last word."""
    return partial(_storm, victim=victim, kills=kills, alone=alone)


def _storm(lab: Lab, victim: Victim, kills: int, alone: bool) -> None:
    lab.begin("downloaded")
    command = lab.stage_command("train") if alone else ("dvc", "repro", "train")
    for left in range(kills, 0, -1):
        while not _killed_at_random(lab, command, victim):
            assert_outputs_equal(lab, "train") if not alone else None
            lab.begin("downloaded")
        if victim == "sender" and left > 1:  # it costs the training nothing, which has ended
            assert_trained(lab)
            lab.begin("downloaded")


def _killed_at_random(lab: Lab, command: tuple[str, ...], victim: Victim) -> bool:
    """Begin a training and kill it at a random moment; False where it was over before."""
    running = lab.start(*command)
    behind = len(set(lab.epochs()))
    stage = lab.process_of("train")
    epoch = lab.random.randint(behind, EPOCHS)
    if epoch > behind:
        lab.wait_for(lambda: epoch in lab.epochs() or not stage.is_running(), f"epoch {epoch}")
    pause = lab.random.uniform(0, 1.5 if epoch > behind else 5)
    deadline = time.monotonic() + pause
    while stage.is_running() and time.monotonic() < deadline:
        time.sleep(0.01)
    if not stage.is_running():
        running.wait()
        return False
    match victim:
        case "stage":
            kill(stage)
        case "sender":
            lab.wait_for(lambda: lab.find(*SENDER) or running.process.poll() is not None, "the sender")
            if (sender := lab.find(*SENDER)) is None:  # the training was over before
                running.wait()
                return False
            kill(sender)
        case "dvc":
            running.process.kill()
        case "group":
            running.signal("SIGKILL")
    running.wait()
    lab.wait_for_quiet(GRACE_S)
    return True


def kill(process: psutil.Process) -> None:
    """Kill a process that may be gone already."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


# asked to end


def asked_to_end(signal: str, reason: str) -> Callable[[Lab], None]:
    """Send a signal to dvc and its stage during the third epoch, as a terminal or a shutdown does."""
    return partial(_asked_to_end, signal=signal, reason=reason)


def _asked_to_end(lab: Lab, signal: str, reason: str) -> None:
    lab.begin("downloaded")
    running = lab.start("dvc", "repro")
    lab.wait_for_epoch(2)
    running.signal(signal)
    running.wait(GRACE_S)
    lab.wait_for_quiet(GRACE_S)
    assert lab.sql("SELECT status FROM runs") == [("KILLED",)]
    assert lab.sql("SELECT value FROM tags WHERE key = 'reason'") == [(f"train: {reason}",)]
    lab.next_says = ("resuming after epoch",)


def at_dvc(stage: str, place: str, **rule: Any) -> Callable[[Lab], None]:
    """Kill dvc itself at a call."""
    return partial(_at_dvc, stage=stage, rule={"at": place, "do": "SIGKILL", **rule})


def _at_dvc(lab: Lab, stage: str, rule: dict[str, Any]) -> None:
    lab.begin(BEFORE.get(stage, "trained"))
    lab.run("dvc", "repro", stage, env=lab.rules(rule) | {"PYTHONPATH": str(lab.clone / "src")})
    lab.assert_interfered()
