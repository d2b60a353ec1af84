"""A fresh clone of the last commit, with an empty DVC cache and no MLflow store, to run `dvc repro` in."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.measure import SHOWN_LINES, MeasurementError, environment

STAGES = ("download", "train", "evaluate", "render_samples", "render_grid")


@dataclass(frozen=True)
class Repro:
    """One `dvc repro`, in seconds."""

    total: float
    before: float  # DVC's own start, until the first stage
    stages: dict[str, float]  # each from its announcement to the next one's, or to the end


def make_clone(folder: Path, epochs: int | None = None) -> Path:
    """Clone the last commit to ``folder``; ``epochs`` replaces the default number of epochs."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    if epochs is not None:
        params = folder / "params.yaml"
        params.write_text(re.sub(r"(?m)^  epochs: \d+", f"  epochs: {epochs}", params.read_text()))
    return folder


def repro(folder: Path) -> Repro:
    """Run the pipeline, noting when each stage begins.

    Raises:
        MeasurementError: a stage failed, or MNIST was not to be had.
    """
    clean = environment() | {"PYTHONUNBUFFERED": "1", "DVC_SITE_CACHE_DIR": str(folder / ".dvc" / "site-cache")}
    del clean["PYTHONPATH"]
    begun, lines = [], []
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=folder,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        lines.append(line)
        if match := re.match(r"Running stage '(.+)':", line):
            begun.append((match[1], time.perf_counter()))
    status, ended = process.wait(), time.perf_counter()
    if status:
        raise MeasurementError(f"dvc repro ended with status {status}:\n{''.join(lines[-SHOWN_LINES:])}")
    if begun and '"name": "mnist"' not in (folder / "data" / "dataset.json").read_text():
        raise MeasurementError("dvc repro went on without MNIST; set MNIST_MIRROR to a URL or a folder that has it")
    ends = [moment for _, moment in begun[1:]] + [ended]
    return Repro(
        total=ended - started,
        before=(begun[0][1] if begun else ended) - started,
        stages={name: end - begin for (name, begin), end in zip(begun, ends, strict=True)} if begun else {},
    )
