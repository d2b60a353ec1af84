"""The benchmarks compare like with like, and say what they measured."""

import json
import re
import subprocess
import sys
import time
from itertools import product

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import record_function

from benchmarks import worker
from benchmarks.bare import bare_loop
from benchmarks.clock import DeviceClock, EpochClock, covered
from benchmarks.measure import MeasurementError, Sample, Worker, alternate, measure
from benchmarks.questions import FAST, FULL, QUESTIONS, QUICK, Bench, answer
from benchmarks.repro import STAGES, import_seconds, work_ended
from benchmarks.results import Limit, Section, machine, render
from benchmarks.worker import parameters, repeated, settings, without_checkpoints
from mnist_vae.data.dataset import save_dataset
from tools.clone import ROOT


@pytest.fixture
def images() -> np.ndarray:
    """Strokes of random gray, (2000, 28, 28): something a VAE can learn in a few steps."""
    generator = np.random.default_rng(0)
    canvas = np.zeros((2_000, 28, 28), np.uint8)
    for image, column in zip(canvas, generator.integers(5, 22, len(canvas)), strict=True):
        image[4:24, column : column + 3] = generator.integers(128, 256)
    return canvas


def rows(text: str) -> list[list[str]]:
    """The cells of every row of Markdown's tables."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_bare_loop_and_fit_do_the_same_optimisation(images):
    from mnist_vae.model.vae import VAEConfig
    from mnist_vae.training.fit import fit

    train = settings(epochs=3, accelerator="cpu")

    bare = bare_loop(torch.from_numpy(images).flatten(1), train, train.epochs)
    fitted = fit(images, VAEConfig(), train).history

    assert [epoch.loss for epoch in bare] == pytest.approx([row["loss"] for row in fitted], rel=1e-4)
    assert bare[-1].loss < 0.7 * bare[0].loss


def test_without_checkpoints_keeps_fit_from_writing_any(images, tmp_path):
    from mnist_vae.model.vae import VAEConfig
    from mnist_vae.training.fit import fit

    train = settings(epochs=1, accelerator="cpu")

    fit(images, VAEConfig(), train, checkpoints=tmp_path / "with")
    fit(images, VAEConfig(), train, checkpoints=tmp_path / "without", callbacks=[without_checkpoints()])

    assert [path.parent.name for path in tmp_path.rglob("*.ckpt")] == ["with"]


def test_device_clock_takes_the_part_of_the_last_epoch_in_which_the_device_works(images):
    from mnist_vae.model.vae import VAEConfig
    from mnist_vae.training.fit import fit

    class Rest(Callback):
        def on_train_batch_end(self, *_):
            with record_function("an annotation, which is no work"):
                time.sleep(0.2)

    epochs, device = EpochClock(), DeviceClock()

    fit(images, VAEConfig(), settings(epochs=2, accelerator="cpu"), callbacks=[Rest(), epochs, device])

    assert 0.01 < device.seconds < epochs.seconds[-1] - 0.2


def test_pipeline_says_how_long_the_device_worked_where_asked_for(images, monkeypatch):
    monkeypatch.setattr(worker, "training_images", lambda count: images)

    plain, profiled = (worker.pipeline(kept=False, profiled=profiled, epochs=1) for profiled in (False, True))

    assert "working" not in plain
    assert 0 < profiled["working"] < profiled["seconds"][-1]


def test_covered_counts_once_what_overlaps():
    assert covered([(7, 8), (0, 4), (1, 2), (3, 5)]) == 6
    assert covered([]) == 0


def test_notebook_does_the_same_optimisation(images, tmp_path, monkeypatch):
    """Its noise and order of images differ, so its losses agree only roughly."""
    pytest.importorskip("lightning")
    from benchmarks import notebook

    monkeypatch.chdir(tmp_path)
    labelled = [(torch.from_numpy(image)[None] / 255, 0) for image in images]
    monkeypatch.setattr(notebook.datasets, "MNIST", lambda *args, **kwargs: labelled)
    params = parameters()
    cells = notebook.Notebook(params.train)

    seconds = cells.train(epochs=2)
    png_bytes = cells.draw(params.samples, params.grid)

    bare = bare_loop(torch.from_numpy(images).flatten(1), params.train, 2)
    log = (tmp_path / cells.log.log_dir / "metrics.csv").read_text().splitlines()
    logged = dict(zip(log[0].split(","), log[-1].split(","), strict=True))
    mean_batch = len(images) / -(-len(images) // 64)
    assert len(seconds) == 2
    assert float(logged["loss"]) / mean_batch == pytest.approx(bare[-1].loss, rel=0.2)
    assert png_bytes > 10_000


def test_worker_answers_with_its_result_and_its_memory(tmp_path):
    result = measure("gpu", tmp_path)

    assert "name" in result
    assert result["peak_bytes"] > 50e6
    assert result["wall"] > 0


def test_worker_trains_in_several_processes_also_where_nothing_is_kept(tmp_path, digits_dataset):
    save_dataset(tmp_path / "dataset", digits_dataset)

    result = measure("pipeline", tmp_path, devices=2, kept=False, images=640, epochs=2)

    assert len(result["seconds"]) == 2


def test_worker_that_failed_says_why(tmp_path):
    with pytest.raises(MeasurementError, match=r"(?s)bare .*dataset\.json is missing") as failed:
        Worker("bare", tmp_path, epochs=1).result()

    assert 'File "' not in str(failed.value)  # no traceback


def test_alternate_lets_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}

    results = alternate(calls, 2)

    assert "".join(order) == "abcbca"
    assert {name: len(values) for name, values in results.items()} == {"a": 2, "b": 2, "c": 2}


def test_sample_shows_its_median_and_spread():
    assert Sample.of([5.0, 4.0, 4.5]).text() == "4.50 (4.00–5.00)"
    assert Sample.of([4]).text(1) == "4.0"


@pytest.mark.parametrize(
    ("value", "at_least", "verdict"),
    [
        (1.2, False, "holds"),
        (1.25, False, "holds"),
        (1.26, False, "**does not hold**"),
        (1.26, True, "holds"),
        (1.2, True, "**does not hold**"),
        (float("nan"), False, "**does not hold**"),
        (float("nan"), True, "**does not hold**"),
    ],
)
def test_limit_gives_the_verdict_that_follows_from_the_numbers(value, at_least, verdict):
    assert Limit("ratio", value, 1.25, at_least=at_least).row()[-1] == verdict


def test_render_shows_a_broken_limit_at_the_top():
    section = Section("Speed", "How.", ["side", "s"], [["left", "2.0"]], [Limit("left / right", 2.0, 1.25)])

    text = render([section], ["Machine: made up"])

    top, _, rest = text.partition("## Speed")
    assert ["Speed", "left / right", "2.00 ×", "at most 1.25 ×", "**does not hold**"] in rows(top)
    assert "- Machine: made up" in top
    assert ["left", "2.0"] in rows(rest)
    assert {line.count("|") for line in rest.splitlines() if line.startswith("|")} == {3}


def test_answer_goes_on_after_a_failed_question(monkeypatch):
    def fails(bench):
        raise MeasurementError("no such luck")

    monkeypatch.setitem(QUESTIONS, "gpu", fails)
    monkeypatch.setitem(QUESTIONS, "threads", lambda bench: Section("Threads", "How."))

    sections = list(answer(None, ["gpu", "threads"]))

    assert [section.title for section in sections] == ["gpu", "Threads"]
    text = render(sections, [])
    assert ["gpu", "could not be measured", "", "", "**does not hold**"] in rows(text)
    assert "no such luck" in text


def test_import_seconds_counts_every_module_once():
    command = [sys.executable, "-X", "importtime", "-c", "import json"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    own = [int(microseconds) for microseconds in re.findall(r"^import time: +(\d+) \|", report, re.MULTILINE)]
    assert len(own) > 10
    assert import_seconds(report) == pytest.approx(sum(own) / 1e6, abs=len(own) / 1e6)  # each is rounded


def test_work_ended_is_the_last_end_of_the_stage(tmp_path):
    journal = tmp_path / "journal" / "0123" / "records.jsonl"
    journal.parent.mkdir(parents=True)
    records = [("end", "train", 2000), ("begin", "evaluate", 2500), ("end", "evaluate", 3000), ("end", "train", 1000)]
    lines = [json.dumps({"type": what, "stage": stage, "at": at}) for what, stage, at in records]
    journal.write_text("\n".join(lines))

    assert work_ended(tmp_path, "train") == 2
    assert work_ended(tmp_path, "download") is None


def test_repeated_begins_again_after_the_last_image():
    images = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28)

    copy = repeated(images, 7)

    assert copy.shape == (7, 28, 28)
    assert not np.shares_memory(copy, images)
    np.testing.assert_array_equal(copy, images[[0, 1, 2, 0, 1, 2, 0]])


def test_machine_names_memory_versions_and_commit():
    text = "\n".join(machine())

    assert re.search(r"cores, \d+ GiB", text)
    assert f"torch {torch.__version__}" in text
    assert re.search(r"Commit: ([0-9a-f]{40}, with(out)? uncommitted changes|unknown)", text)


@pytest.fixture
def gpu_bench(monkeypatch):
    """A bench on a made-up GPU. CUDA graphs in bfloat16 are the fastest, and only their loss is far from the plain one.

    A plain epoch at batch 64 takes half a second.
    """

    def answers(self, task, epochs=0, images=0, device="", test=False, profiled=False, **changes):
        if task == "gpu":
            return {"name": "Made-up GPU", "torch": "2"}
        train = settings(**changes)  # every name and value is one that params.yaml may have
        assert (images, device or train.accelerator) == (QUICK.images, "cuda" if task == "bare" else "gpu")
        speed = {"none": 1, "default": 2, "reduce-overhead": 4}[train.compile] * train.batch_size / 64
        speed *= 2 if train.precision == "bf16-mixed" else 1
        loss = {1: 155.0, 8: 159.0}.get(speed * 64 / train.batch_size, 154.75)
        answer = {"seconds": [9.0, 9.0] + [0.5 / speed] * (epochs - 2)}
        return answer | ({"test_loss": loss} if test else {}) | ({"working": 0.125 / speed} if profiled else {})

    monkeypatch.setattr(Bench, "worker", answers)
    return Bench(ROOT, QUICK)


def test_gpu_has_a_row_for_each_batch_precision_and_compile(gpu_bench):
    section = gpu_bench.gpu()

    assert section.about.startswith("Made-up GPU.")
    assert {len(row) for row in section.rows} == {len(section.columns)}
    pipeline = [tuple(row[1:4]) for row in section.rows if row[0] == "pipeline"]
    modes = ("none", "default", "reduce-overhead")
    assert sorted(pipeline) == sorted(product(("64", "4096"), ("32-true", "bf16-mixed"), modes))
    assert ["bare loop", "64", "32-true", "none", "0.5000", "12,800", "", "", ""] in section.rows
    assert ["pipeline", "64", "32-true", "none", "0.5000", "12,800", "25%", "155.00", "+0.00"] in section.rows
    assert ["pipeline", "64", "bf16-mixed", "default", "0.1250", "51,200", "25%", "154.75", "-0.25"] in section.rows
    assert section.rows[-1][-2:] == ["159.00", "+4.00"]


def test_gpu_limits_are_for_the_fastest_epoch_with_an_equal_loss(gpu_bench):
    limits = gpu_bench.gpu().limits

    fastest = 0.5 / 4  # at eight times the plain step's speed the loss is another
    assert [limit.value for limit in limits] == [fastest, fastest / 64]
    assert [limit.limit for limit in limits] == [0.1, 0.025]
    assert [limit.holds for limit in limits] == [False, True]


def test_gpu_measures_nothing_where_there_is_none(monkeypatch):
    asked = []
    monkeypatch.setattr(Bench, "worker", lambda self, task: asked.append(task) or {"name": None, "torch": "2.13.0"})

    section = Bench(ROOT, QUICK).gpu()

    assert asked == ["gpu"]
    assert section == Section("GPU", "No GPU was there: `torch.cuda.is_available()` is false (torch 2.13.0).")


def test_fast_setting_is_valid():
    assert settings(**FAST).schedule == "one_cycle"


def test_stages_are_those_of_dvc_yaml():
    from ruamel.yaml import YAML

    assert tuple(YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]) == STAGES


def test_quick_is_less_than_full():
    assert QUICK.rounds < FULL.rounds
    assert QUICK.images < FULL.images


# What the documents say of it


def text_of_documents() -> str:
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))])


def test_documented_ratios_are_those_of_the_last_benchmark():
    told = [row for row in rows(text_of_documents()) if "holds" in row]
    assert len(told) >= 5
    measured = rows((ROOT / "benchmarks/results.md").read_text())
    assert [row for row in told if row not in measured] == []


def test_documented_command_for_those_in_a_hurry_is_the_one_that_is_measured():
    text = text_of_documents().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "-S train.schedule=one_cycle" in line]
    assert commands
    for command in commands:
        told = re.findall(r"-S train\.(\w+)=(\S+)", command)
        assert told == [(name, str(value)) for name, value in FAST.items()]
