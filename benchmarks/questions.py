"""The questions: what is compared with what, and the limits that this project sets itself.

Each question is a method of ``Bench`` that measures and returns a ``Section``. Everything trains on the CPU except the
last. Wherever an epoch is timed, the first one is warm-up and dropped, for all sides alike, unless said otherwise.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.measure import Sample, Worker, alternate, available_cores, busy_process, measure
from benchmarks.repro import STAGES, make_clone, repro, run_stage
from benchmarks.results import Limit, Section
from benchmarks.server import fail_three_times, mlflow_server, synchronise
from benchmarks.tracking import Storm, shared_database, storm
from tools.deployment import postgres_program, postgresql, tracking_server

IMAGES = 60_000
NOTEBOOK_EPOCHS = 10
# Time to quality: what docs/experiments.md recommends to those in a hurry.
FAST = {"schedule": "one_cycle", "batch_size": 128, "learning_rate": 1e-2, "epochs": 4, "threads": 2}
GPU_TARGETS = {64: 0.1, 4_096: 0.025}  # seconds per epoch by the size of a mini-batch, on an H200
EQUAL_LOSS = 0.02  # of the loss, for the other noise that a compiled step may draw


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 3
    long_rounds: int = 3  # of what takes minutes
    images: int = IMAGES  # trained on where epochs are timed
    epochs: int = 1  # timed, after the warm-up
    fine_rounds: int = 5  # where a difference is small beside the noise
    fine_epochs: int = 5
    pause: float = 2  # seconds between the failures of a server, and of each
    whole_epochs: int | None = None  # of the whole pipeline and the whole notebook, instead of the default
    seeds: tuple[int, ...] = (1, 2, 3)
    growth: tuple[int, ...] = (10_000, 60_000, 600_000)
    large: tuple[int, int] = (300_000, 10_000_000)  # images in memory, and images in a file
    evaluated: tuple[int, ...] = (10_000, 20_000, 40_000, 80_000)
    weighed: tuple[int, ...] = (500, 1_000, 2_000)  # images of importance sampling
    draws: tuple[int, ...] = (50, 100, 200, 400)  # its samples per image
    workspaces: int = 8  # that send short runs at once
    short_runs: int = 25  # of each
    tasks: int = 10_000  # for Dask


LARGE_MEMORY = 1_500_000_000  # bytes for a training on images from a file

FULL = Effort()
QUICK = Effort(
    rounds=1,
    long_rounds=1,
    images=6_400,
    fine_rounds=1,
    fine_epochs=1,
    pause=0.5,
    whole_epochs=1,
    seeds=(1,),
    growth=(2_000, 20_000),
    large=(6_400, 20_000),
    evaluated=(2_000, 10_000),
    weighed=(100, 200),
    draws=(50, 100),
    workspaces=2,
    short_runs=3,
    tasks=1_000,
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

    def throughput(self) -> Section:
        effort, default = self.effort, len(self.cores)
        common = {"epochs": effort.epochs + 1, "images": effort.images}
        steps = {"epochs": effort.epochs + 1, "steps": -(-effort.images // 64)}
        calls = {}
        for threads in self.threads:
            calls["bare loop", threads] = lambda t=threads: self.worker("bare", t, **common)
            calls["notebook", threads] = lambda t=threads: self.worker("notebook", t, **steps)
            calls["pipeline", threads] = lambda t=threads: self.worker("pipeline", t, **common)
        epochs = {key: seconds_per_epoch(runs) for key, runs in alternate(calls, effort.rounds).items()}
        best = {side: min(sample.median for (name, _), sample in epochs.items() if name == side) for side, _ in epochs}

        fine = {"epochs": effort.fine_epochs + 1, "images": effort.images}
        beside, without = "pipeline, next to it", "pipeline without journal and checkpoints"
        calls = {
            (beside, 1): lambda: self.worker("pipeline", **fine),
            (without, 1): lambda: self.worker("pipeline", kept=False, **fine),
        }
        epochs |= {key: seconds_per_epoch(runs) for key, runs in alternate(calls, effort.fine_rounds).items()}
        pairs = zip(epochs[beside, 1].values, epochs[without, 1].values, strict=True)
        share = Sample.of(100 * (1 - seconds / kept_seconds) for kept_seconds, seconds in pairs)
        own = epochs["pipeline", 1].median
        return Section(
            "Training throughput",
            "Seconds per epoch with the default parameters, on the CPU: the notebook's loop re-written "
            "(benchmarks/notebook.py), the same training as a bare loop (benchmarks/bare.py), and the pipeline's as in "
            "the stage train, with a checkpoint per epoch, and a journal that a process beside it sends to MLflow. The "
            "ratios compare each side's better number of threads. What journal and checkpoints cost is measured in "
            f"{plural(effort.fine_rounds, 'round')} more, of {plural(effort.fine_epochs, 'epoch')} each. The first "
            "epoch is warm-up and dropped on all sides.",
            ["contender", "threads", "s per epoch", "images/s"],
            [
                [side, str(threads), sample.text(), f"{effort.images / sample.median:,.0f}"]
                for (side, threads), sample in sorted(epochs.items())
            ],
            [
                Limit("pipeline / bare loop, an epoch", best["pipeline"] / best["bare loop"], 1.25),
                Limit("pipeline / notebook, an epoch", best["pipeline"] / best["notebook"], 0.3),
                Limit("journal and checkpoints, share of an epoch", share.median, 3, "%"),
            ],
            f"With the threads that each takes by default (pipeline 1, the others {default}): "
            f"{own / epochs['bare loop', default].median:.2f} × the bare loop, "
            f"{own / epochs['notebook', default].median:.2f} × the notebook. "
            f"Journal and checkpoints take {share.text(1)} % of an epoch.",
        )

    def whole_pipeline(self) -> Section:
        effort, number = self.effort, count()
        epochs = effort.whole_epochs or NOTEBOOK_EPOCHS

        def fresh() -> Path:
            return make_clone(self.folder / f"clone-{next(number)}", effort.whole_epochs)

        def cold() -> dict[str, Any]:
            folder = fresh()
            run = repro(folder, "--force")  # a picture that is committed and still right would not be drawn
            if tuple(run.stages) != STAGES:
                raise RuntimeError(f"a cold dvc repro ran {', '.join(run.stages) or 'nothing'}, not all stages")
            idle = [repro(folder) for _ in range(effort.rounds)]
            if any(again.stages for again in idle):
                raise RuntimeError(f"a no-op dvc repro ran {', '.join(idle[0].stages)}")
            return {"cold": run, "idle": [again.total for again in idle]}

        def one_by_one() -> dict[str, Any]:
            folder = fresh()
            return {name: run_stage(folder, name) for name in STAGES}

        calls = {"dvc repro": cold, "stages one by one": one_by_one}
        for threads in {1, len(self.cores)}:
            calls["notebook", threads] = lambda t=threads: self.worker("whole_notebook", t, epochs=epochs)
        found = alternate(calls, effort.long_rounds)

        runs = [run["cold"] for run in found["dvc repro"]]
        total, idle = Sample.of(r.total for r in runs), Sample.of(s for run in found["dvc repro"] for s in run["idle"])
        notebooks = {
            key[1]: Sample.of(result["wall"] for result in results)
            for key, results in found.items()
            if key[0] == "notebook"
        }
        rows = [["DVC's own start", Sample.of(run.before for run in runs).text(), ""]]
        for name in STAGES:
            wall = Sample.of(run.stages[name] for run in runs)
            inside = [
                Sample.of(run[name][account] for run in found["stages one by one"]).median
                for account in ("imports", "compute", "tracking")
            ]
            parts = [f"{seconds:.2f}" for seconds in (*inside, wall.median - sum(inside))]
            rows.append([name, wall.text(), f"{wall.median / total.median:.0%}", *parts])
        rows.append(["**dvc repro, cold**", f"**{total.text()}**", "100%"])
        rows.append(["dvc repro, nothing to do", idle.text()])
        rows += [[f"notebook, {plural(threads, 'thread')}", sample.text()] for threads, sample in notebooks.items()]
        return Section(
            "Whole pipeline",
            "`dvc repro --force` in a fresh clone of the last commit (uncommitted changes are not in it), with an "
            f"empty cache and no MLflow store, {plural(epochs, 'epoch')}; next to it the notebook from its first "
            "import to its last picture, without seaborn. Both fetch MNIST from the same mirror. What a stage spends "
            "on imports (by `python -X importtime`), compute and tracking is from another cold pass, stage by stage "
            "without DVC; tracking is the wait at its end for the process beside it that calls MLflow. The rest is "
            "DVC's (hashing, the lock file), and carries the noise of both passes.",
            ["", "seconds", "share", "imports", "compute", "tracking", "rest"],
            [row + [""] * (7 - len(row)) for row in rows],
            [
                Limit("cold dvc repro / notebook as it stands", total.median / notebooks[len(self.cores)].median, 0.5),
                Limit("no-op dvc repro", idle.median, 3.0, "s"),
            ],
            "The notebook as it stands takes torch's default, a thread per core. Next to the notebook with the number "
            "of threads that suits it best, the cold `dvc repro` takes "
            f"{total.median / min(sample.median for sample in notebooks.values()):.2f} ×.",
        )

    def quality(self) -> Section:
        effort = self.effort
        small = {} if effort.images == IMAGES else {"images": effort.images, "epochs": 1}
        fast_setting = {**FAST, **small}
        fast_threads = fast_setting.pop("threads")
        steps = None if effort.images == IMAGES else -(-effort.images // 64)
        epochs = effort.whole_epochs or NOTEBOOK_EPOCHS
        calls = {}
        for seed in effort.seeds:
            calls["default", seed] = lambda s=seed: self.worker("pipeline", test=True, seed=s, **small)
            calls["fast", seed] = lambda s=seed: self.worker(
                "pipeline", fast_threads, test=True, seed=s, **fast_setting
            )
        for threads in self.threads:
            calls["notebook", threads] = lambda t=threads: self.worker("notebook", t, epochs=epochs, steps=steps)
        found = {key: runs[0] for key, runs in alternate(calls, 1).items()}
        times = {threads: sum(found["notebook", threads]["seconds"]) for threads in self.threads}
        notebook, tuned = times[len(self.cores)], min(times.values())
        rows = []
        for seed in effort.seeds:
            pair = [found[setting, seed] for setting in ("default", "fast")]
            numbers = [text for run in pair for text in (f"{run['test_loss']:.2f}", f"{run['total']:.1f}")]
            rows.append([str(seed), *numbers, f"1/{notebook / pair[1]['total']:.1f}"])
        above = max(found["fast", seed]["test_loss"] - found["default", seed]["test_loss"] for seed in effort.seeds)
        slowest = max(found["fast", seed]["total"] for seed in effort.seeds)
        line = " ".join(f"-S train.{name}={value}" for name, value in FAST.items())
        return Section(
            "Time to quality",
            f"`dvc exp run {line}` next to the default parameters: loss on the test images (nats per image) and "
            "seconds of training, with journal and checkpoints, each training run once. The notebook as it stands, "
            f"with torch's default of a thread per core, trained its {plural(epochs, 'epoch')} in {notebook:.0f} s.",
            ["seed", "default: loss", "s", "fast: loss", "s", "of the notebook's time"],
            rows,
            [
                Limit("fast loss minus default loss, worst seed", above, 0.0, "nats"),
                Limit("fast training / notebook's training, worst seed", slowest / notebook, 1 / 12),
            ],
            f"With the number of threads that suits it best the notebook trained for {tuned:.0f} s, and the slowest "
            f"fast training took 1/{tuned / slowest:.1f} of that.",
        )

    def rate(self, run: dict[str, Any]) -> float:
        """Images per second of a training, but for its first epoch (warm-up) and its last (others may have ended)."""
        return self.effort.images / mean(run["seconds"][1:-1])

    def side_by_side(self, **arguments: Any) -> float:
        """Images per second of two trainings at once, with one thread each."""
        workers = [Worker("pipeline", self.folder, 1, **arguments) for _ in range(2)]
        return sum(self.rate(worker.result()) for worker in workers)

    def thread_counts(self) -> Section:
        effort = self.effort
        common = {"epochs": effort.epochs + 2, "images": effort.images, "cpus": self.pair}

        def alone(threads: int) -> float:
            return self.rate(self.worker("pipeline", threads, **common))

        def beside_busy(threads: int) -> float:
            with busy_process(self.pair):
                return alone(threads)

        idle, busy = "machine idle", "beside a busy process"
        found = alternate(
            {
                ("one experiment", "1", idle): lambda: alone(1),
                ("one experiment", "2", idle): lambda: alone(2),
                ("two side by side", "1 each", idle): lambda: self.side_by_side(**common),
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
            "dropped: warm-up, and the time when the other may already have ended. With one thread, matrix products "
            "are NumPy's and all libraries take AVX2, for equal bytes on all processors; with two, products are "
            "torch's, and the libraries take what suits the processor best.",
            ["", "threads", "", "images/s", "of one alone"],
            [[*key, sample.text(0), f"{sample.median / one:.2f} ×"] for key, sample in rates.items()],
            [Limit("two experiments side by side / one", two / one, 1.7, at_least=True)],
        )

    def processes(self) -> Section:
        effort = self.effort
        common = {"epochs": effort.epochs + 2, "images": effort.images, "batch_size": 512, "cpus": self.pair}
        found = alternate(
            {
                "two processes": lambda: self.rate(self.worker("pipeline", devices=2, **common)),
                "one process": lambda: self.rate(self.worker("pipeline", **common)),
                "two trainings, each its own": lambda: self.side_by_side(**common),
            },
            effort.rounds,
        )
        rates = {key: Sample.of(values) for key, values in found.items()}
        two, one, apart = (rate.median for rate in rates.values())
        return Section(
            "Processes",
            "Training throughput of the pipeline at a global batch of 512, in one process and in two that share each "
            "mini-batch (`train.devices`), with one thread each, on the same two cores; beside it, what two trainings "
            "do there that share nothing. Of every run the first and the last epoch are dropped.",
            ["", "images/s", "of one process"],
            [[key, sample.text(0), f"{sample.median / one:.2f} ×"] for key, sample in rates.items()],
            [Limit("two processes / one, images per second", two / one, 1.7, at_least=True)],
            f"The two processes do {two / apart:.2f} × what two trainings do that share nothing.",
        )

    def server(self) -> Section:
        effort, number, epochs = self.effort, count(), self.effort.whole_epochs or NOTEBOOK_EPOCHS

        def training(fails: bool) -> dict[str, Any]:
            folder = self.folder / f"server-{next(number)}"
            with mlflow_server(folder) as server:
                worker = Worker(
                    "pipeline", self.folder, uri=server.uri, workspace=str(folder), images=effort.images, epochs=epochs
                )
                server.wait_for_a_run()
                if fails:
                    fail_three_times(server, effort.pause)
                result = worker.result()
                synchronise(folder, server.uri)
                if (found := server.steps("train/loss")) != list(range(1, epochs + 1)):
                    raise RuntimeError(f"MLflow has train/loss at the steps {found} of {epochs}")
                return result

        steady, failing = "a server that runs", "killed and started again twice, then hanging"
        calls = {steady: lambda: training(False), failing: lambda: training(True)}
        found = alternate(calls, effort.long_rounds)
        loops = {name: Sample.of(run["total"] for run in runs) for name, runs in found.items()}
        walls = {name: Sample.of(run["wall"] for run in runs) for name, runs in found.items()}
        pairs = zip(loops[failing].values, loops[steady].values, strict=True)
        return Section(
            "A server that fails",
            f"{plural(epochs, 'epoch')} with the default parameters beside an `mlflow server` on the same machine: "
            "one that runs, and one that is killed twice, comes back each time, and then hangs, "
            f"{effort.pause:g} s each time. Loop: the training itself. Process: from its start to its end, with the "
            "bounded wait for the server. Afterwards the run on the server has each epoch's loss once.",
            ["server", "loop, s", "process, s"],
            [[name, loops[name].text(), walls[name].text()] for name in loops],
            [Limit("training beside the failing server / the other", median(a / b for a, b in pairs), 1.05)],
        )

    def tracking(self) -> Section:
        if postgres_program("initdb") is None:
            return Section("Many runs at once", "No PostgreSQL was there.")
        effort, number, epochs = self.effort, count(), NOTEBOOK_EPOCHS

        def on_server(workspaces: int) -> Storm:
            folder = self.folder / f"storm-{next(number)}"
            folder.mkdir()
            with postgresql() as database, tracking_server(folder, database, len(self.cores)) as server:
                return storm(folder, server.add_user("ada"), workspaces, effort.short_runs, epochs)

        def on_sqlite(workspaces: int) -> Storm:
            folder = self.folder / f"storm-{next(number)}"
            folder.mkdir()
            return storm(folder, shared_database(folder), workspaces, effort.short_runs, epochs)

        calls = {}
        for workspaces in (1, effort.workspaces):
            calls["one SQLite database", workspaces] = lambda n=workspaces: on_sqlite(n)
            calls["deploy/ on PostgreSQL", workspaces] = lambda n=workspaces: on_server(n)
        rows = []
        for (store, workspaces), storms in alternate(calls, effort.long_rounds).items():
            told, sent = (
                Sample.of(getattr(one, name) for one in storms) for name in ("told_per_second", "sent_per_second")
            )
            runs = Sample.of(one.sent_per_second / (epochs + 4) for one in storms)
            values = Sample.of(one.metrics / one.seconds for one in storms)
            rows.append([store, str(workspaces), told.text(0), sent.text(), values.text(), runs.text()])
        return Section(
            "Many runs at once",
            f"{plural(effort.short_runs, 'run')} in each of some workspaces, told to their journals as fast as these "
            f"take them, {plural(epochs, 'epoch')} of 4 metrics and one file each, sent by one sender per workspace; "
            f"the server ({plural(len(self.cores), 'worker')}) and PostgreSQL share the machine with them. Afterwards "
            "each run is compared with what was told: none is lost, doubled or mixed up. A run is "
            f"{epochs + 4} records.",
            ["store", "workspaces", "journal, records/s each", "store, records/s", "metrics/s", "runs/s"],
            rows,
        )

    def large(self) -> Section:
        in_memory, in_file = self.effort.large
        for images in (in_memory, in_file):
            self.worker("synthetic", images=images)
        calls = {
            ("in memory", in_memory): lambda: self.worker("large", images=in_memory),
            ("from a file", in_file): lambda: self.worker("large", images=in_file, memory=LARGE_MEMORY),
        }
        rows, speed = [], {}
        for (where, images), runs in alternate(calls, self.effort.rounds).items():
            seconds = Sample.of(run["seconds"][-1] for run in runs)
            speed[where] = images / seconds.median
            size = f"{runs[0]['data_bytes'] / 1e6:,.0f}"
            rows.append([where, f"{images:,}", size, seconds.text(1), f"{speed[where]:,.0f}"])
        return Section(
            "Data of any size",
            "One epoch on MNIST's images by repetition, batch 64: in memory with one permutation, and gathered from a "
            f"mapped file with a shuffle window, by a process that gets no more than {LARGE_MEMORY / 1e9} GB of memory "
            "of its own (RLIMIT_DATA; the file's pages in the system's cache are not counted).",
            ["images", "number", "data, MB", "s per epoch", "images/s"],
            rows,
            [Limit("time per image from a file / in memory", speed["in memory"] / speed["from a file"], 1.25)],
        )

    def scheduling(self) -> Section:
        tasks = self.effort.tasks
        runs = alternate({"Dask": lambda: self.worker("scheduling", tasks=tasks)}, self.effort.rounds)["Dask"]
        rate = Sample.of(tasks / run["seconds"] for run in runs)
        grown = Sample.of(run["grown"] / 1e6 for run in runs)
        return Section(
            "Scheduling",
            "Empty tasks at once on a local Dask cluster of two workers: what a sweep of as many experiments asks of "
            "the scheduler, whose memory is that of the driver's process.",
            ["tasks", "tasks/s", "memory, MB"],
            [[f"{tasks:,}", rate.text(0), grown.text(0)]],
        )

    def growth(self) -> Section:
        effort = self.effort
        middle = effort.draws[1]
        training = [("training", images, 1) for images in effort.growth]
        elbo = [("ELBO", images, 10) for images in effort.evaluated]
        quadrature = [("quadrature", images, 1) for images in effort.evaluated[:3]]
        by_images = [("importance sampling", images, middle) for images in effort.weighed]
        by_draws = [("importance sampling", effort.weighed[0], draws) for draws in effort.draws]
        calls = {key: lambda n=key[1]: self.worker("pipeline", epochs=2, images=n) for key in training}
        for what, images, draws in elbo + quadrature + by_images + by_draws:
            arguments = {"estimator": what, "images": images, "draws": draws}
            calls[what, images, draws] = lambda a=arguments: self.worker("evaluate", **a)

        each, memory, rows = {}, {}, []  # seconds per image and draw; MB of images and of the process's peak
        for key, runs in alternate(calls, effort.rounds).items():
            what, images, draws = key
            seconds = Sample.of(run["seconds"][-1] for run in runs)
            peak, data = Sample.of(run["peak_bytes"] / 1e6 for run in runs), runs[0]["data_bytes"] / 1e6
            each[key], memory[key] = seconds.median / images / draws, (data, peak.median)
            sizes = [f"{data:,.0f}", peak.text(0), f"{peak.median - data:,.0f}"]
            rows.append([what, f"{images:,}", str(draws), seconds.text(), f"{1e6 * each[key]:,.2f}", *sizes])

        (first_data, first_peak), (last_data, last_peak) = memory[training[0]], memory[training[-1]]
        series = {
            "epoch: time per image": training,
            "ELBO: time per image": elbo,
            "quadrature: time per image": quadrature,
            "importance sampling: time per image": by_images,
            "importance sampling: time per draw": by_draws,
        }
        return Section(
            "Growth",
            "One epoch of the pipeline (the second of two), and the estimators of the stage evaluate, on more and more "
            "images by repetition; MB of memory are those of the whole process at its peak, uint8 images included. "
            "Linear growth shows as a time per image and draw of z that stays. The limits say what is taken for "
            "“linear” and for “the data plus a constant”.",
            ["what", "images", "draws", "seconds", "µs per image and draw", "data, MB", "peak, MB", "peak − data, MB"],
            rows,
            [
                *(
                    Limit(f"{what}, largest / smallest", each[keys[-1]] / each[keys[0]], 1.2)
                    for what, keys in series.items()
                ),
                Limit(
                    "training: bytes of peak per byte of images",
                    (last_peak - first_peak) / (last_data - first_data),
                    1.1,
                ),
            ],
        )

    def gpu(self) -> Section:
        chip = self.worker("gpu")
        if chip["name"] is None:
            return Section("GPU", f"No GPU was there: `torch.cuda.is_available()` is false (torch {chip['torch']}).")
        effort, plain = self.effort, ("32-true", "none")
        common = {"epochs": effort.fine_epochs + 2, "images": effort.images}
        calls, trainings = {}, {}
        for size in GPU_TARGETS:
            key = ("bare loop", size, *plain)
            calls[key] = lambda n=size: self.worker("bare", device="cuda", batch_size=n, **common)
            for precision, mode in product(("32-true", "bf16-mixed"), ("none", "default", "reduce-overhead")):
                key = ("pipeline", size, precision, mode)
                changes = {"batch_size": size, "precision": precision, "compile": mode}
                trainings[key] = {"accelerator": "gpu", **changes, **common}
                calls[key] = lambda a=trainings[key]: self.worker("pipeline", test=True, **a)
        found = alternate(calls, effort.rounds)
        loss = {key: Sample.of(run["test_loss"] for run in found[key]).median for key in trainings}
        rows, equal = [], {size: [] for size in GPU_TARGETS}  # seconds per epoch of trainings with an equal loss
        for key, runs in found.items():
            seconds, size = seconds_per_epoch(runs, warm_up=2), key[1]
            rows.append([*map(str, key), seconds.text(4), f"{effort.images / seconds.median:,.0f}"])
            if key in trainings:
                working = self.worker("pipeline", profiled=True, **trainings[key])["working"]
                usual = loss["pipeline", size, *plain]
                more = loss[key] - usual
                rows[-1] += [f"{working / seconds.median:.0%}", f"{loss[key]:.2f}", f"{more:+.2f}"]
                if abs(more) <= EQUAL_LOSS * usual:
                    equal[size].append(seconds.median)
        return Section(
            "GPU",
            f"{chip['name']}. Seconds per epoch of the pipeline as in the stage train, with journal and checkpoints: "
            "in float32 and with layers in bfloat16 (`train.precision`), with a plain step, a compiled one and one "
            "that is replayed as CUDA graphs (`train.compile`: none, default, reduce-overhead); next to it the bare "
            "loop. The first two epochs are dropped: the first ends with a smaller mini-batch, for which a step is "
            "compiled again. How long the GPU works in an epoch, with kernels or copies, is from one more run, under "
            "torch's profiler; the share is of the median epoch without it. The loss is that on the test images after "
            f"{plural(common['epochs'], 'epoch')}, in nats per image, next to that of float32 with a plain step; one "
            f"no more than {EQUAL_LOSS:.0%} of it away counts as equal. The limits are meant for an H200.",
            ["contender", "batch", "precision", "compile", "s per epoch", "images/s", "GPU works", "loss", "− plain"],
            [row + [""] * (9 - len(row)) for row in rows],
            [
                Limit(f"fastest epoch with an equal loss, batch {size}", min(equal[size]), target, "s")
                for size, target in GPU_TARGETS.items()
            ],
        )


def seconds_per_epoch(runs: list[dict[str, Any]], warm_up: int = 1) -> Sample:
    """The mean of each run's epochs but the first ones, the warm-up."""
    return Sample.of(mean(run["seconds"][warm_up:]) for run in runs)


def plural(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


QUESTIONS = {
    "throughput": Bench.throughput,
    "pipeline": Bench.whole_pipeline,
    "quality": Bench.quality,
    "threads": Bench.thread_counts,
    "processes": Bench.processes,
    "server": Bench.server,
    "tracking": Bench.tracking,
    "scheduling": Bench.scheduling,
    "growth": Bench.growth,
    "large": Bench.large,
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
