"""A training in several processes, on one host and on two, is the training of one; and ends, and resumes, as one."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from mnist_vae.training.strategies import IS_POSSIBLE
from tests.distributed.cases import CASES, SIZES, STEPS
from tests.pipeline import clone_working_tree, run, set_params
from tools.clone import ROOT, environment

pytestmark = pytest.mark.distributed

COUNTS = (1, 2, 3)
CLOSE = 1e-5  # relative
# 46,016 images are fifteen mini-batches and one of 1,016, which neither two nor three processes share evenly.
SMALL = {
    "train.eps": 1.0,  # with a small one, Adam is blind to the scale of gradients
    "data.dataset": "digits",
    "model.hidden_dims": [16],
    "train.epochs": 4,
    "train.batch_size": 3_000,
    "train.accelerator": "cpu",
}
TRAIN = (sys.executable, "-m", "stages", "train")
TIME_LIMIT_S = 240
MINUTE_S = 60
WHERE_MEMORY_IS_SHARED = pytest.mark.skipif(not IS_POSSIBLE, reason="only under Linux on x86-64")


# the same training


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, digits_dataset) -> dict[int, Path]:
    """A folder for each number of processes, with what each of them got in each case."""
    folders, images = {}, tmp_path_factory.mktemp("images") / "100.npy"
    np.save(images, digits_dataset.x_train[::97][:100])
    for count in COUNTS:
        folders[count] = tmp_path_factory.mktemp(f"processes-{count}")
        command = [sys.executable, "-m", "tests.distributed.cases", str(count), str(images), str(folders[count])]
        env = environment(ROOT, PYTHONPATH=f"{ROOT / 'src'}:{ROOT}")
        subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=TIME_LIMIT_S)
    return folders


def result(folder: Path, case: str, rank: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{case}, {rank}.json").read_text())
    return content


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("case", CASES)
def test_several_processes_follow_the_losses_of_one(fitted, case, count):
    one, several = (result(fitted[number], case) for number in (1, count))

    tolerance = {"rel": 1e-2} if case == "layers in bfloat16" else {"rel": CLOSE}
    assert len(several["history"]) == len(one["history"])
    for ours, expected in zip(several["history"], one["history"], strict=True):
        assert ours == pytest.approx(expected, **tolerance)
    assert several["best_epoch"] == one["best_epoch"]


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("case", CASES)
def test_all_processes_end_with_the_same_history_and_only_the_first_logs_it(fitted, case, count):
    first, *others = (result(fitted[count], case, rank) for rank in range(count))

    assert [step for step, _ in first["logged"]] == [row["epoch"] for row in first["history"]]
    assert [metrics["train/loss"] for _, metrics in first["logged"]] == [row["loss"] for row in first["history"]]
    for other in others:
        assert other["history"] == first["history"]
        assert other["logged"] == []
        assert (other["best_epoch"], other["weights"]) == (first["best_epoch"], first["weights"])
        assert not other["is_shared"]


@WHERE_MEMORY_IS_SHARED
@pytest.mark.parametrize("count", COUNTS[1:])
def test_all_step_down_the_sum_of_gradients_decide_and_meet_also_where_some_are_slow(fitted, count):
    total = sum(rank**2 for rank in range(count))
    after = [-sum(total + count * step for step in range(steps)) for steps in range(1, STEPS + 1)]
    outcomes = [json.loads((fitted[count] / f"sums, {rank}.json").read_text()) for rank in range(count)]

    for outcome in outcomes:
        assert outcome["weights"] == [[[value] * size for size in SIZES] for value in after]
        assert outcome["sums"] == [[[total]] * 2, [[total + count]] * 2, [[total] * sum(SIZES)] * 2]
        assert outcome["decisions"] == [[True, False, True], [False, False, True]]
    assert sorted(number for outcome in outcomes for number in outcome["own"]) == [*range(len(SIZES))]
    assert min(outcome["met"][1] for outcome in outcomes) >= max(outcome["met"][0] for outcome in outcomes)


@WHERE_MEMORY_IS_SHARED
@pytest.mark.parametrize("count", COUNTS[1:])
def test_on_one_host_processes_share_memory(fitted, count):
    assert result(fitted[count], "held out")["strategy"] == "SharedMemoryStrategy"
    assert result(fitted[count], "by DDP")["strategy"] == "SummingDDPStrategy"


def test_the_best_epoch_of_a_case_is_not_its_last(fitted):
    held_out = result(fitted[1], "held out")

    assert held_out["best_epoch"] < len(held_out["history"])


# the stage, on one host


class Outcome(NamedTuple):
    """How a process ended."""

    status: int
    errors: str  # its stderr


class Stage:
    """``python -m stages train``, or what ``command`` is, running in a folder."""

    def __init__(self, folder: Path, *command: str, **env: str) -> None:
        self.folder = folder
        self.errors = folder.parent / f"{folder.name}-{time.monotonic_ns()}.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command or TRAIN,
                cwd=folder,
                env=environment(folder, PYTHONPATH="src", **env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def workers(self) -> list[psutil.Process]:
        """The processes of the training but this, wherever they are in its tree."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in below if child.cmdline()[-3:] == ["-m", "stages", "train"]]

    def wait_for_line(self, part: str) -> str:
        """The first line of its stderr with this in it."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while not (found := [line for line in self.errors.read_text().splitlines() if part in line]):
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.1)
        return found[0].strip()

    def wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + TIME_LIMIT_S
        while not list(self.folder.glob("checkpoints/*/last.ckpt")):
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.05)

    def wait(self) -> Outcome:
        try:
            status = self.process.wait(TIME_LIMIT_S)
        finally:
            self.process.kill()
        return Outcome(status, self.errors.read_text())

    def succeed(self) -> "Stage":
        """Wait for its end, which must be a good one."""
        status, errors = self.wait()
        assert status == 0, errors
        return self


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with code, parameters and data, without git and DVC."""
    folder = tmp_path_factory.mktemp("workplace") / "mnist-vae"
    folder.mkdir()
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder)
    set_params(folder, SMALL)
    Stage(folder, *TRAIN[:-1], "download").succeed()
    return folder


@pytest.fixture
def host(workplace, tmp_path) -> Path:
    """A copy of the workplace."""
    return Path(shutil.copytree(workplace, tmp_path / "host"))


@pytest.fixture(scope="module")
def losses_of_one(workplace, tmp_path_factory) -> list[dict[str, str]]:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("one") / "host"
    shutil.copytree(workplace, folder)
    Stage(folder).succeed()
    return losses(folder)


def losses(folder: Path) -> list[dict[str, str]]:
    with (folder / "plots/losses.csv").open() as file:
        return list(csv.DictReader(file))


def assert_follows(folder: Path, expected: list[dict[str, str]]) -> None:
    """The losses of a training are those of another up to rounding; a term may differ by what the other gains."""
    rows = losses(folder)
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        loss = float(other["loss"])
        assert float(row["loss"]) == pytest.approx(loss, rel=CLOSE)
        for term in ("bce", "kld"):
            assert float(row[term]) == pytest.approx(float(other[term]), rel=CLOSE, abs=CLOSE * loss)


def ends(folder: Path) -> list[tuple[str, str]]:
    """How the journal says that stages ended: status and reason."""
    (journal,) = folder.glob("journal/*/records.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    return [(record["status"], record["reason"]) for record in records if record["type"] == "end"]


def test_a_training_that_lost_a_worker_ends_and_resumes_with_another_number_of_processes(host, losses_of_one):
    set_params(host, {"train.devices": 3})
    killed = Stage(host)
    killed.wait_for_checkpoint()
    victim, *_ = workers = killed.workers()
    assert len(workers) == 2

    victim.kill()
    since = time.monotonic()
    status, errors = killed.wait()

    assert status == 1
    assert time.monotonic() - since < MINUTE_S
    assert not any(worker.is_running() for worker in workers)
    (line,) = [line for line in errors.splitlines() if not line.startswith("epoch ")]
    assert "of 3 (on " in line
    assert "was ended by SIGKILL; the training has ended on all hosts" in line
    assert ends(host) == [("FAILED", line.removeprefix("train: "))]
    assert not (host / "models/vae.safetensors").exists()

    set_params(host, {"train.devices": 2})
    resumed = Stage(host).succeed()

    assert "resuming after epoch " in resumed.errors.read_text()
    assert ends(host)[1:] == [("FINISHED", "")]
    assert_follows(host, losses_of_one)


def test_ctrl_c_ends_all_processes_and_marks_the_run_as_killed(host):
    set_params(host, {"train.devices": 2, "train.epochs": 1_000})
    stage = Stage(host)
    stage.wait_for_checkpoint()
    (worker,) = stage.workers()

    stage.process.send_signal(signal.SIGINT)

    assert stage.wait().status == 128 + signal.SIGINT
    assert not worker.is_running()
    assert ends(host) == [("KILLED", "SIGINT")]


def test_workers_end_when_the_first_process_is_killed(host):
    set_params(host, {"train.devices": 2, "train.epochs": 1_000})
    stage = Stage(host)
    stage.wait_for_checkpoint()
    (worker,) = stage.workers()

    stage.process.kill()

    worker.wait(MINUTE_S)


def test_torchruns_environment_decides_how_many_processes_there_are(host, losses_of_one):
    Stage(host, "torchrun", "--standalone", "--nproc-per-node", "2", *TRAIN[1:]).succeed()

    assert_follows(host, losses_of_one)


def test_dvc_repro_starts_the_processes_and_records_the_result(tmp_path, losses_of_one):
    clone = clone_working_tree(tmp_path / "mnist-vae")
    set_params(clone, SMALL | {"train.devices": 2})

    run(clone, "dvc", "repro", "train")

    assert_follows(clone, losses_of_one)
    assert "up to date" in run(clone, "dvc", "status", "train").stdout


# two hosts: network namespaces, joined by a cable

ADDRESSES = ("10.99.0.1", "10.99.0.2")


@pytest.fixture
def clone(tmp_path):
    """A clone of the working tree with small parameters and their data."""
    folder = clone_working_tree(tmp_path / "mnist-vae")
    set_params(folder, SMALL)
    run(folder, "dvc", "repro", "download")
    return folder


@pytest.fixture
def hosts() -> Iterator[tuple[tuple[str, ...], ...]]:
    """For each of two hosts the command that runs another one there."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root, and ip (Debian's iproute2)")
    names = [f"mnist-vae-{os.getpid()}-{letter}" for letter in "ab"]
    with ExitStack() as stack:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
                pytest.skip("may not make network namespaces here")
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield tuple(("ip", "netns", "exec", name) for name in names)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def second_host(host: Path) -> Iterator[Path]:
    """A folder as another host would have it, in which nothing may change."""
    other = Path(shutil.copytree(host, host.with_name("other")))
    before = files(other)
    yield other
    assert files(other) == before


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("first", [TRAIN[1:], ("--no-python", "dvc", "repro", "train")], ids=["stage", "dvc"])
def test_torchrun_over_two_hosts_follows_the_losses_of_one_process(clone, hosts, losses_of_one, first):
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29511"]
    with second_host(clone) as other:
        stages = [
            Stage(folder, *there, "torchrun", *options, "--node-rank", str(number), *what)
            for number, (folder, there, what) in enumerate(zip((clone, other), hosts, (first, TRAIN[1:]), strict=True))
        ]
        for stage in stages:
            stage.succeed()

    assert_follows(clone, losses_of_one)
    assert ("up to date" in run(clone, "dvc", "status", "train").stdout) == ("dvc" in first)


def test_dvc_repro_on_the_first_host_prints_the_line_of_the_second_and_records_the_result(clone, hosts, losses_of_one):
    set_params(clone, {"train.nodes": 2})
    with second_host(clone) as other:
        first = Stage(clone, *hosts[0], "dvc", "repro", "train", MASTER_ADDR=ADDRESSES[0])
        line = first.wait_for_line("NODE_RANK=1")
        second = Stage(other, *hosts[1], "sh", "-c", line)
        for stage in (first, second):
            stage.succeed()

    assert_follows(clone, losses_of_one)
    assert "up to date" in run(clone, "dvc", "status", "train").stdout


def test_a_line_on_each_host_follows_the_losses_of_one_process_also_after_a_worker_is_lost(host, hosts, losses_of_one):
    set_params(host, {"train.nodes": 2, "train.devices": 2})
    with second_host(host) as other:
        first = Stage(host, *hosts[0], *TRAIN, MASTER_ADDR=ADDRESSES[0])
        second = Stage(other, *hosts[1], *TRAIN, MASTER_ADDR=ADDRESSES[0], NODE_RANK="1")
        first.wait_for_checkpoint()
        second.workers()[-1].kill()
        for stage in (first, second):
            status, errors = stage.wait()
            assert status == 1
            assert "was ended by SIGKILL; the training has ended on all hosts" in errors
            assert "Traceback" not in errors
        assert ends(host)[0][0] == "FAILED"

        set_params(other, {"train.devices": 1})
        set_params(host, {"train.devices": 1})
        again = [
            Stage(other, *hosts[1], *TRAIN, MASTER_ADDR=ADDRESSES[0], NODE_RANK="1"),
            Stage(host, *hosts[0], *TRAIN, MASTER_ADDR=ADDRESSES[0]),
        ]
        for stage in again:
            stage.succeed()

    assert "resuming after epoch " in again[1].errors.read_text()
    assert_follows(host, losses_of_one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.seed": 7}, "differ in params: all hosts need the same commit, params.yaml, data and packages"),
        ({"train.devices": 1}, "has train.nodes 2 and train.devices 1: all hosts need the same"),
        ({"train.devices": 3}, "has train.nodes 2 and train.devices 3: all hosts need the same"),
    ],
)
def test_hosts_with_other_parameters_are_refused_on_both(host, hosts, changes, message):
    set_params(host, {"train.nodes": 2, "train.devices": 2})
    with second_host(host) as other:
        set_params(other, changes)
        first = Stage(host, *hosts[0], *TRAIN, MASTER_ADDR=ADDRESSES[0])
        second = Stage(other, *hosts[1], *TRAIN, MASTER_ADDR=ADDRESSES[0], NODE_RANK="1")

        for stage in (first, second):
            status, errors = stage.wait()
            assert status == 1
            assert message in errors
            assert "Traceback" not in errors
