"""`dvc repro` in a fresh clone of the last commit, and where the seconds of its stages go."""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import SHOWN_LINES, MeasurementError
from tools.clone import clone, environment

STAGES = ("download", "train", "evaluate", "render_samples", "render_grid")

# A line of `python -X importtime`: its own and its cumulative microseconds, and the module, indented where another
# module imports it.
TOP_LEVEL_IMPORT = re.compile(r"^import time: +\d+ \| +(\d+) \| (?! )", re.MULTILINE)


@dataclass(frozen=True)
class Repro:
    """One `dvc repro`, in seconds."""

    total: float
    before: float  # DVC's own start, until the first stage
    stages: dict[str, float]  # each from its announcement to the next one's, or to the end


def make_clone(folder: Path, epochs: int | None = None) -> Path:
    """Clone the last commit to ``folder``; ``epochs`` replaces the default number of epochs."""
    clone(folder)
    if epochs is not None:
        params = folder / "params.yaml"
        params.write_text(re.sub(r"(?m)^  epochs: \d+", f"  epochs: {epochs}", params.read_text()))
    return folder


def repro(folder: Path, *options: str) -> Repro:
    """Run the pipeline, noting when each stage begins.

    Raises:
        MeasurementError: a stage failed, or went on without MNIST.
    """
    begun, lines = [], []
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", *options],
        cwd=folder,
        env=environment(folder, PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if match := re.match(r"Running stage '(.+)':", line):
            begun.append((match[1], time.perf_counter()))
    status, ended = process.wait(), time.perf_counter()
    if status:
        raise MeasurementError(f"dvc repro ended with status {status}:\n{''.join(lines[-SHOWN_LINES:])}")
    if json.loads((folder / "data" / "dataset.json").read_text())["name"] != "mnist":
        raise MeasurementError("dvc repro went on without MNIST; set MNIST_MIRROR to a URL or a folder that has it")
    ends = [moment for _, moment in begun[1:]] + [ended]
    return Repro(
        total=ended - started,
        before=(begun[0][1] if begun else ended) - started,
        stages={name: end - begin for (name, begin), end in zip(begun, ends, strict=True)} if begun else {},
    )


def run_stage(folder: Path, name: str) -> dict[str, float]:
    """The seconds of one stage by itself, without DVC: imports, compute, and the wait for tracking at its end.

    Raises:
        MeasurementError: the stage failed.
    """
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stages", name],
        cwd=folder,
        env=environment(folder, PYTHONPATH="src"),
        capture_output=True,
        text=True,
        check=False,
    )
    ended = time.time()
    if done.returncode:
        raise MeasurementError(f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    imports = import_seconds(done.stderr)
    tracking = ended - (work_ended(folder, name) or ended)
    return {"imports": imports, "compute": ended - started - imports - tracking, "tracking": tracking}


def import_seconds(report: str) -> float:
    """What `python -X importtime` reports of the modules that no other module imported, wherever that was."""
    return sum(map(int, TOP_LEVEL_IMPORT.findall(report))) / 1e6


def work_ended(folder: Path, stage: str) -> float | None:
    """When a stage told its journal that its work was done, in seconds since 1970; None for a stage without one."""
    records = [json.loads(line) for path in folder.glob("journal/*/records.jsonl") for line in path.open()]
    ends = [record["at"] / 1000 for record in records if record["type"] == "end" and record["stage"] == stage]
    return max(ends, default=None)
