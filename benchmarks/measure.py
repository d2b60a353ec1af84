"""Measurements in processes of their own, so that threads, memory and imports of one do not touch another's."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tools.clone import ROOT, environment

TIME_LIMIT_S = 3600
SHOWN_LINES = 15  # of a failed process's error output


class MeasurementError(Exception):
    """A measurement that failed, with what its process said."""


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity: ``4.61 (4.55–4.80)`` is the median and the spread from min to max."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Any) -> "Sample":
        return cls(tuple(float(value) for value in values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, digits: int = 2) -> str:
        spread = f" ({min(self.values):,.{digits}f}–{max(self.values):,.{digits}f})" if len(self.values) > 1 else ""
        return f"{self.median:,.{digits}f}{spread}"


class Worker:
    """``benchmarks.worker`` at one task, started at once; ``result`` waits for it."""

    def __init__(self, task: str, folder: Path, threads: int = 1, uri: str = "", **arguments: Any) -> None:
        self.name = f"{task} {json.dumps(arguments)}"
        self.errors = TemporaryFile("w+")  # noqa: SIM115  closed by result
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", task, json.dumps({"threads": threads, **arguments})],
            cwd=folder,
            env=environment(
                folder,
                PYTHONPATH=os.pathsep.join(map(str, (ROOT / "src", ROOT))),
                OMP_NUM_THREADS=str(threads),
                MKL_NUM_THREADS=str(threads),
                MPLBACKEND="agg",
                MLFLOW_TRACKING_URI=uri,
            ),
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def result(self) -> dict[str, Any]:
        """What the task returned, with ``wall`` (seconds from start to exit) and ``peak_bytes`` of memory."""
        try:
            answer, _ = self.process.communicate(timeout=TIME_LIMIT_S)
        except BaseException:
            self.process.kill()
            raise
        wall = time.perf_counter() - self.started
        with self.errors:
            if self.process.returncode:
                self.errors.seek(0)
                said = "\n".join(self.errors.read().strip().splitlines()[-SHOWN_LINES:])
                raise MeasurementError(f"{self.name} ended with status {self.process.returncode}:\n{said}")
        return {**json.loads(answer), "wall": wall}


def measure(task: str, folder: Path, threads: int = 1, **arguments: Any) -> dict[str, Any]:
    """One task alone, from start to result."""
    return Worker(task, folder, threads, **arguments).result()


def alternate(contenders: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[Any]]:
    """Each contender's results, one per round; all take their turn in each round, every round begins with another."""
    results: dict[Any, list[Any]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            results[name].append(contenders[name]())
            label = ", ".join(map(str, name)) if isinstance(name, tuple) else name
            print(f"  round {number + 1}/{rounds}: {label}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return results


@contextmanager
def busy_process(cpus: list[int] | None = None) -> Iterator[None]:
    """One process beside ours that never rests, and ends with us however we end."""
    pin = f"os.sched_setaffinity(0, {cpus})" if cpus else ""
    rush = f"import os\n{pin}\nwhile os.getppid() == {os.getpid()}: sum(range(100_000))"
    process = subprocess.Popen([sys.executable, "-c", rush])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def available_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
