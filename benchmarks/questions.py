"""The issue's six questions: what is compared with what, and the limits that stand in the issue.

Each question is a method of ``Bench`` that measures and returns a ``Section``. Everything trains on the CPU except the
last. Wherever an epoch is timed, the first one is warm-up and dropped, for all sides alike, unless said otherwise.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.clone import STAGES, make_clone, repro
from benchmarks.measure import Sample, Worker, alternate, available_cores, busy_process, measure
from benchmarks.table import Limit, Section

IMAGES = 60_000
NOTEBOOK_EPOCHS = 10
# Time to quality: what the README recommends to the impatient.
FAST = {"schedule": "one_cycle", "batch_size": 128, "learning_rate": 1e-2, "epochs": 4, "threads": 2}
# Floating-point operations per image of a training step: twice for each weight forward, for its own gradient and for
# that of its input, which the first layer does not need.
FLOPS = 6 * (784 * 256 + 256 * 4 + 2 * 256 + 256 * 784) - 2 * 784 * 256


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 3
    long_rounds: int = 3  # of what takes minutes
    images: int = IMAGES  # trained on where epochs are timed
    epochs: int = 1  # timed, after the warm-up
    whole_epochs: int | None = None  # of the whole pipeline and the whole notebook, instead of the default
    seeds: tuple[int, ...] = (1, 2, 3)
    growth: tuple[int, ...] = (10_000, 60_000, 600_000)
    evaluated: tuple[int, ...] = (10_000, 20_000, 40_000, 80_000)
    weighed: tuple[int, ...] = (500, 1_000, 2_000)  # images of importance sampling
    draws: tuple[int, ...] = (50, 100, 200, 400)  # its samples per image


FULL = Effort()
QUICK = Effort(
    rounds=1,
    long_rounds=1,
    images=6_400,
    epochs=1,
    whole_epochs=1,
    seeds=(1,),
    growth=(2_000, 20_000),
    evaluated=(2_000, 10_000),
    weighed=(100, 200),
    draws=(50, 100),
)


class Bench:
    """The measurements, in ``folder``, which ``prepare`` has filled."""

    def __init__(self, folder: Path, effort: Effort) -> None:
        self.folder, self.effort = folder, effort
        self.cores = available_cores()
        self.threads = sorted({1, 2, len(self.cores)})
        self.pair = self.cores[:2] if len(self.cores) > 2 and hasattr(os, "sched_setaffinity") else None

    def worker(self, task: str, threads: int = 1, **arguments: Any) -> dict[str, Any]:
        return measure(task, self.folder, threads, **arguments)

    @cached_property
    def epochs(self) -> dict[tuple[str, str], Sample]:
        """Seconds per epoch of each contender with each number of threads; 'fit alone' is the pipeline untracked."""
        effort = self.effort
        epochs, steps = effort.epochs + 1, -(-effort.images // 64)
        calls = {}
        for threads in self.threads:
            name = in_words(threads)
            calls["bare loop", name] = lambda t=threads: self.worker("bare", t, epochs=epochs, images=effort.images)
            calls["pipeline", name] = lambda t=threads: self.worker("pipeline", t, epochs=epochs, images=effort.images)
            calls["notebook", name] = lambda t=threads: self.worker("notebook", t, epochs=epochs, steps=steps)
        found = alternate(calls, effort.rounds)
        samples = {key: Sample.of(mean(run["seconds"][1:]) for run in runs) for key, runs in found.items()}
        for (side, threads), runs in found.items():
            if side == "pipeline":
                alone = [mean(run["seconds"][1:]) - mean(run["tracking"][1:]) for run in runs]
                samples["pipeline without tracking", threads] = Sample.of(alone)
        return samples

    def best(self, side: str) -> Sample:
        """The sample of the number of threads that suits a contender best."""
        return min((sample for (name, _), sample in self.epochs.items() if name == side), key=lambda s: s.median)

    def by_default(self, side: str) -> Sample:
        """The sample of the number of threads that a contender takes if nobody says: torch's, one per core."""
        return self.epochs[side, in_words(len(self.cores))]

    def throughput(self) -> Section:
        bare, pipeline, notebook = (self.best(side).median for side in ("bare loop", "pipeline", "notebook"))
        own = self.epochs["pipeline", in_words(1)].median
        return Section(
            "Training throughput",
            "Seconds per epoch with the default parameters, on the CPU: the notebook's loop re-written "
            "(benchmarks/notebook.py), the same training as a bare loop (benchmarks/bare.py), and the pipeline's, with "
            "every epoch logged live to MLflow as in the stage train. The ratios compare each side's better number of "
            "threads. The first epoch is warm-up and dropped on all sides.",
            ["contender", "threads", "s per epoch", "images/s"],
            [
                [side, threads.split()[0], sample.text(), f"{self.effort.images / sample.median:,.0f}"]
                for (side, threads), sample in sorted(self.epochs.items())
            ],
            [
                Limit("pipeline / bare loop, an epoch", pipeline / bare, 1.25),
                Limit("pipeline / notebook, an epoch", pipeline / notebook, 0.3),
            ],
            f"With the threads that each takes by default (pipeline 1, the others {len(self.cores)}): "
            f"{own / self.by_default('bare loop').median:.2f} × the bare loop, "
            f"{own / self.by_default('notebook').median:.2f} × the notebook.",
        )

    def whole_pipeline(self) -> Section:
        effort = self.effort
        epochs = effort.whole_epochs or NOTEBOOK_EPOCHS
        number = iter(range(1_000_000))

        def cold() -> dict[str, Any]:
            clone = make_clone(self.folder / f"clone-{next(number)}", effort.whole_epochs)
            run = repro(clone)
            if tuple(run.stages) != STAGES:
                raise RuntimeError(f"a cold dvc repro ran {', '.join(run.stages) or 'nothing'}, not all stages")
            idle = [repro(clone) for _ in range(effort.rounds)]
            if any(again.stages for again in idle):
                raise RuntimeError(f"a no-op dvc repro ran {', '.join(idle[0].stages)}")
            return {"cold": run, "idle": [again.total for again in idle]}

        def accounts() -> dict[str, Any]:
            clone = make_clone(self.folder / f"clone-{next(number)}", effort.whole_epochs)
            return {name: self.worker("stage", name=name, clone=str(clone)) for name in STAGES}

        calls = {"dvc repro": cold, "stages one by one": accounts}
        for threads in {1, len(self.cores)}:
            calls["notebook", threads] = lambda t=threads: self.worker("whole_notebook", t, epochs=epochs)
        found = alternate(calls, effort.long_rounds)

        runs = [run["cold"] for run in found["dvc repro"]]
        total, idle = Sample.of(r.total for r in runs), Sample.of(s for run in found["dvc repro"] for s in run["idle"])
        rows = [["DVC's own start", Sample.of(run.before for run in runs).text(), *[""] * 5]]
        for name in STAGES:
            wall = Sample.of(run.stages[name] for run in runs)
            inside = {
                account: Sample.of(run[name][account] for run in found["stages one by one"]).median
                for account in ("imports", "compute", "tracking")
            }
            rest = wall.median - sum(inside.values())
            share = f"{wall.median / total.median:.0%}"
            rows.append([name, wall.text(), share, *(f"{s:.2f}" for s in inside.values()), f"{rest:.2f}"])
        rows.append(["**dvc repro, cold**", f"**{total.text()}**", "100%", *[""] * 4])
        rows.append(["dvc repro, nothing to do", idle.text(), *[""] * 5])
        notebooks = {}
        for key, results in found.items():
            if isinstance(key, tuple):
                notebooks[key] = Sample.of(result["wall"] for result in results)
                rows.append([f"notebook, {in_words(key[1])}", notebooks[key].text(), *[""] * 5])
        as_it_stands = notebooks["notebook", len(self.cores)].median
        fastest = min(sample.median for sample in notebooks.values())
        return Section(
            "Whole pipeline",
            f"`dvc repro` in a fresh clone of the last commit (uncommitted changes are not in it) with an empty cache "
            f"and no MLflow store, {epochs} epoch{'s' if epochs > 1 else ''}; next to it the notebook from its first "
            "import to its last picture, without seaborn. Both fetch MNIST from the same mirror. What a stage spends "
            "on imports, compute and tracking is from another cold pass, stage by stage without DVC; tracking is what "
            "it waits for the process beside it, where MLflow is loaded and called. The rest is DVC's (hashing, the "
            "lock file) and the start and end of the process, and carries the noise of both.",
            ["", "seconds", "share", "imports", "compute", "tracking", "rest"],
            rows,
            [
                Limit("cold dvc repro / notebook as it stands", total.median / as_it_stands, 0.5),
                Limit("no-op dvc repro", idle.median, 3.0, "s"),
            ],
            f"The notebook as it stands takes torch's default, a thread per core. Next to the notebook with the number "
            f"of threads that suits it best, the cold `dvc repro` takes {total.median / fastest:.2f} ×.",
        )

    def quality(self) -> Section:
        effort = self.effort
        small = {} if effort.images == IMAGES else {"images": effort.images, "epochs": 1}
        calls = {}
        for seed in effort.seeds:
            calls["default", seed] = lambda s=seed: self.worker("pipeline", test=True, seed=s, **small)
            calls["fast", seed] = lambda s=seed: self.fast(s, small)
        steps = None if effort.images == IMAGES else -(-effort.images // 64)
        epochs = effort.whole_epochs or NOTEBOOK_EPOCHS
        for threads in self.threads:
            calls["notebook", threads] = lambda t=threads: self.worker("notebook", t, epochs=epochs, steps=steps)
        found = {key: runs[0] for key, runs in alternate(calls, 1).items()}
        times = {threads: sum(found["notebook", threads]["seconds"]) for threads in self.threads}
        notebook, tuned = times[len(self.cores)], min(times.values())
        rows = []
        for seed in effort.seeds:
            default, fast = found["default", seed], found["fast", seed]
            rows.append(
                [
                    str(seed),
                    f"{default['test_loss']:.2f}",
                    f"{default['total']:.1f}",
                    f"{fast['test_loss']:.2f}",
                    f"{fast['total']:.1f}",
                    f"1/{notebook / fast['total']:.1f}",
                ]
            )
        above = max(found["fast", seed]["test_loss"] - found["default", seed]["test_loss"] for seed in effort.seeds)
        slowest = max(found["fast", seed]["total"] for seed in effort.seeds)
        line = " ".join(f"-S train.{name}={value}" for name, value in FAST.items())
        return Section(
            "Time to quality",
            f"`dvc exp run {line}` next to the default parameters: loss on the test images (nats per image) and "
            f"seconds of training, with live tracking. The notebook as it stands, with torch's default of a thread per "
            f"core, trained its {epochs} epochs in {notebook:.0f} s.",
            ["seed", "default: loss", "s", "fast: loss", "s", "of the notebook's time"],
            rows,
            [
                Limit("fast loss minus default loss, worst seed", above, 0.0, "nats"),
                Limit("fast training / notebook's training, worst seed", slowest / notebook, 1 / 12),
            ],
            f"With the number of threads that suits it best the notebook trained for {tuned:.0f} s, and the slowest "
            f"fast training took 1/{tuned / slowest:.1f} of that.",
        )

    def fast(self, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
        setting = {**FAST, **changes}
        return self.worker("pipeline", setting.pop("threads", 1), test=True, seed=seed, **setting)

    def thread_counts(self) -> Section:
        effort = self.effort
        epochs = effort.epochs + 2  # the first is warm-up; in the last one the other may have ended
        common = {"epochs": epochs, "images": effort.images, "cpus": self.pair}

        def rate(run: dict[str, Any]) -> float:
            return effort.images / mean(run["seconds"][1:-1])

        def side_by_side() -> float:
            workers = [Worker("pipeline", self.folder, 1, **common) for _ in range(2)]
            return sum(rate(worker.result()) for worker in workers)

        def beside_busy(threads: int) -> float:
            with busy_process(self.pair):
                return rate(self.worker("pipeline", threads, **common))

        idle, busy = "machine idle", "beside a busy process"
        found = alternate(
            {
                ("one experiment", "1", idle): lambda: rate(self.worker("pipeline", 1, **common)),
                ("one experiment", "2", idle): lambda: rate(self.worker("pipeline", 2, **common)),
                ("two side by side", "1 each", idle): side_by_side,
                ("one experiment", "1", busy): lambda: beside_busy(1),
                ("one experiment", "2", busy): lambda: beside_busy(2),
            },
            effort.rounds,
        )
        rates = {key: Sample.of(values) for key, values in found.items()}
        one = rates["one experiment", "1", idle].median
        two = rates["two side by side", "1 each", idle].median
        return Section(
            "Threads",
            "Training throughput of the pipeline on two cores, batch 64. Of every run the first and the last epoch are "
            "dropped: warm-up, and the time when the other may already have ended.",
            ["", "threads", "", "images/s", "of one alone"],
            [[*key, sample.text(0), f"{sample.median / one:.2f} ×"] for key, sample in rates.items()],
            [Limit("two experiments side by side / one", two / one, 1.7, at_least=True)],
        )

    def growth(self) -> Section:
        effort = self.effort
        calls = {}
        for count in effort.growth:
            calls["training", count, ""] = lambda n=count: self.worker("pipeline", epochs=2, images=n)
        for count in effort.evaluated:
            calls["ELBO", count, "10 draws"] = lambda n=count: self.worker(
                "evaluate", estimator="elbo", images=n, effort=10
            )
        for count in effort.evaluated[:3]:
            calls["quadrature", count, ""] = lambda n=count: self.worker(
                "evaluate", estimator="quadrature", images=n, effort=0
            )
        middle = effort.draws[1]
        for count in effort.weighed:
            calls["importance sampling", count, f"K = {middle}"] = lambda n=count: self.worker(
                "evaluate", estimator="importance", images=n, effort=middle
            )
        for draws in effort.draws:
            calls["importance sampling", effort.weighed[0], f"K = {draws}"] = lambda k=draws: self.worker(
                "evaluate", estimator="importance", images=effort.weighed[0], effort=k
            )
        found = alternate(calls, effort.rounds)

        seconds, memory, rows = {}, {}, []
        for (what, count, detail), runs in found.items():
            key, draws = (what, count, detail), int(detail[4:]) if detail.startswith("K") else 1
            seconds[key] = Sample.of(run["seconds"][-1] if what == "training" else run["seconds"] for run in runs)
            peak, data = Sample.of(run["peak_bytes"] / 1e6 for run in runs), runs[0]["data_bytes"] / 1e6
            memory[key] = (data, peak.median)
            each = 1e6 * seconds[key].median / count / draws
            rest = f"{peak.median - data:,.0f}"
            rows.append(
                [what, f"{count:,}", detail, seconds[key].text(), f"{each:,.2f}", f"{data:,.0f}", peak.text(0), rest]
            )

        def per_unit(keys: list[tuple[str, int, str]], units: list[int]) -> float:
            """Seconds per unit of the largest over those of the smallest."""
            return (seconds[keys[-1]].median / units[-1]) / (seconds[keys[0]].median / units[0])

        training = [("training", count, "") for count in effort.growth]
        (first_data, first_peak), (last_data, last_peak) = memory[training[0]], memory[training[-1]]
        by_k = [("importance sampling", effort.weighed[0], f"K = {draws}") for draws in effort.draws]
        by_images = [("importance sampling", count, f"K = {middle}") for count in effort.weighed]
        grid = [("quadrature", count, "") for count in effort.evaluated[:3]]
        elbo = [("ELBO", count, "10 draws") for count in effort.evaluated]
        return Section(
            "Growth",
            "One epoch of the pipeline (the second of two), and the estimators of the stage evaluate, on more and more "
            "images by repetition; MB of memory are those of the whole process at its peak, uint8 images included. "
            "Linear growth shows as a time per image (and per importance sample) that stays. The limits in this "
            "section are the benchmark's own reading of “linear” and “the data plus a constant”.",
            ["what", "images", "", "seconds", "µs per image (and sample)", "data, MB", "peak, MB", "peak − data, MB"],
            rows,
            [
                Limit("epoch: time per image, largest / smallest", per_unit(training, list(effort.growth)), 1.2),
                Limit(
                    "training: bytes of peak per byte of images",
                    (last_peak - first_peak) / (last_data - first_data),
                    1.1,
                ),
                Limit("ELBO: time per image, largest / smallest", per_unit(elbo, list(effort.evaluated)), 1.2),
                Limit(
                    "quadrature: time per image, largest / smallest", per_unit(grid, list(effort.evaluated[:3])), 1.2
                ),
                Limit(
                    "importance sampling: time per image, largest / smallest",
                    per_unit(by_images, list(effort.weighed)),
                    1.2,
                ),
                Limit("importance sampling: time per K, largest / smallest", per_unit(by_k, list(effort.draws)), 1.2),
            ],
        )

    def gpu(self) -> Section:
        chip = self.worker("gpu")
        if chip["name"] is None:
            return Section("GPU", f"No GPU was there: `torch.cuda.is_available()` is false (torch {chip['torch']}).")
        effort, sizes = self.effort, (64, 512, 4_096)
        epochs = effort.epochs + 1
        calls = {}
        for size in sizes:
            common = {"epochs": epochs, "images": effort.images, "batch_size": size}
            calls["bare loop", size] = lambda c=common: self.worker("bare", device="cuda", **c)
            calls["pipeline", size] = lambda c=common: self.worker("pipeline", accelerator="gpu", **c)
        found = alternate(calls, effort.rounds)
        rows = []
        for (side, size), runs in found.items():
            seconds = Sample.of(mean(run["seconds"][1:]) for run in runs)
            rate = effort.images / seconds.median
            rows.append([side, str(size), seconds.text(), f"{rate:,.0f}", f"{rate * FLOPS / chip['flops']:.2%}"])
        return Section(
            "GPU",
            f"{chip['name']}. The peak is that of a large float32 matrix product here, {chip['flops'] / 1e12:.1f} "
            f"TFLOP/s; a training step takes {FLOPS / 1e6:.2f} MFLOP per image. The pipeline's seconds include live "
            "tracking. The first epoch is dropped.",
            ["contender", "batch", "s per epoch", "images/s", "of the peak"],
            rows,
        )


def in_words(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


QUESTIONS = {
    "throughput": Bench.throughput,
    "pipeline": Bench.whole_pipeline,
    "quality": Bench.quality,
    "threads": Bench.thread_counts,
    "growth": Bench.growth,
    "gpu": Bench.gpu,
}


def answer(bench: Bench, names: list[str]) -> Iterator[Section]:
    """The section of each question as soon as it is there; one that fails says so in it, and the others go on."""
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        try:
            yield QUESTIONS[name](bench)
        except Exception as error:
            print(f"{name} failed: {error}", file=sys.stderr)
            yield Section(name, "", failure=f"{type(error).__name__}: {error}")
