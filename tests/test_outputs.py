"""A stage that fails or is stopped: what becomes of its outputs and of its run, and what the next `dvc repro` does."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from mlflow.entities import Run
from ruamel.yaml import YAML

from stages import outputs
from tests.pipeline import commit, environment, run, set_params, stages_run
from tests.runs import children, client_of, main_run, stored_runs
from tests.tracking import copy_workspace

pytestmark = pytest.mark.slow

# An output that git keeps, one that is in DVC's cache only, and a folder that is there only.
KEPT, CACHED, FOLDER = Path("kept.txt"), Path("cached.bin"), Path("folder")
IN_FOLDER = (FOLDER / "one.txt", FOLDER / "deep/two.txt")


# putting outputs back, in a repository with one stage that has two outputs


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A repository whose stage has run once."""
    folder = tmp_path_factory.mktemp("toy")
    run(folder, "git", "init", "--quiet")
    for name, value in {"user.name": "A Tester", "user.email": "tester@example.org"}.items():
        run(folder, "git", "config", name, value)
    run(folder, "dvc", "init", "--quiet")
    one, two = IN_FOLDER
    command = f"echo kept > {KEPT}; echo cached > {CACHED}; mkdir -p {two.parent}; echo one > {one}; echo two > {two}"
    stage = {"cmd": command, "outs": [str(CACHED), str(FOLDER)]}
    YAML().dump({"stages": {"toy": stage | {"metrics": [{str(KEPT): {"cache": False}}]}}}, folder / "dvc.yaml")
    run(folder, "dvc", "repro", "--quiet")
    return commit(folder, "A run")


@pytest.fixture
def toy(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the current folder, in which DVC has removed the outputs and a failed stage left other ones."""
    folder = Path(shutil.copytree(made, tmp_path / "toy", symlinks=True))
    monkeypatch.chdir(folder)
    for name, value in environment(folder).items():
        monkeypatch.setenv(name, value)
    for path in (KEPT, CACHED):
        path.unlink()
        path.write_text("half of something else")
    shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    IN_FOLDER[0].write_text("half of something else")
    (FOLDER / "three.txt").write_text("what does not belong there")
    return folder


def left() -> dict[Path, str]:
    files = [KEPT, CACHED, *(path for path in FOLDER.rglob("*") if path.is_file())]
    return {path: path.read_text() for path in files if path.exists()}


def object_of(folder: Path, content: bytes) -> Path:
    """Where DVC's cache has a file of this content."""
    md5 = outputs.md5(content)
    return folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


WHOLE = {KEPT: "kept\n", CACHED: "cached\n", IN_FOLDER[0]: "one\n", IN_FOLDER[1]: "two\n"}


@pytest.mark.usefixtures("toy")
def test_restore_takes_outputs_from_the_cache_and_from_git():
    outputs.restore("toy")
    assert left() == WHOLE


def test_restore_takes_no_output_where_one_is_nowhere(toy):
    shutil.rmtree(toy / ".dvc/cache")
    outputs.restore("toy")
    assert left() == {}


def listing_in(folder: Path) -> Path:
    """Where DVC's cache has the listing of the folder."""
    [found] = (folder / ".dvc/cache/files/md5").glob("??/*.dir")
    return found


@pytest.mark.usefixtures("toy")
def test_a_folder_has_the_hash_and_the_listing_that_dvc_gives_it(toy):
    outputs.restore("toy")
    [folder] = [output for output in outputs.locked("toy") if output.is_folder]
    assert (folder.path, outputs.hash_of(FOLDER), folder.is_there()) == (FOLDER, folder.md5, True)
    assert outputs.listing_of(FOLDER) == listing_in(toy).read_bytes()

    (FOLDER / "three.txt").write_text("one too many")
    assert not folder.is_there()


@pytest.mark.parametrize("content", [b"one\n", b"two\n", None], ids=["a file", "another", "the listing"])
def test_restore_takes_no_folder_of_which_the_cache_lacks_a_part(toy, content):
    (listing_in(toy) if content is None else object_of(toy, content)).unlink()
    outputs.restore("toy")
    assert left() == {}


@pytest.mark.parametrize("content", [b"one\n", b"two\n", None], ids=["a file", "another", "the listing"])
def test_restore_takes_no_folder_of_which_the_cache_has_a_damaged_part(toy, content):
    cached = listing_in(toy) if content is None else object_of(toy, content)
    cached.chmod(0o644)
    cached.write_text("damage")
    outputs.restore("toy")
    assert left() == {}


def add_reader(folder: Path) -> None:
    """A stage that reads the folder."""
    pipeline = YAML(typ="safe").load(folder / "dvc.yaml")
    pipeline["stages"]["reader"] = {"cmd": "true", "deps": [str(FOLDER)]}
    YAML().dump(pipeline, folder / "dvc.yaml")


@pytest.mark.parametrize("content", [b"one\n", None], ids=["a file", "the listing"])
def test_a_damaged_folder_is_removed_with_what_the_cache_has_damaged_of_it(toy, content):
    add_reader(toy)
    other = object_of(toy, b"two\n")
    cached = listing_in(toy) if content is None else object_of(toy, content)
    cached.chmod(0o644)
    cached.write_text("damage")
    assert outputs.remove_damaged("reader") == [FOLDER]
    assert (cached.exists(), FOLDER.exists(), other.exists()) == (False, False, True)


def test_an_input_that_a_user_changed_stays_where_the_cache_is_whole(toy):
    add_reader(toy)
    assert outputs.remove_damaged("reader") == []
    assert IN_FOLDER[0].read_text() == "half of something else"


@pytest.fixture
def staged(toy, monkeypatch) -> Path:
    """The toy as its stage has it that DVC runs."""
    monkeypatch.setattr(outputs, "WORKSPACE", toy)
    monkeypatch.setenv("DVC_STAGE", "toy")
    return toy


def test_a_damaged_object_in_the_cache_is_replaced(staged):
    outputs.restore("toy")
    cached = object_of(staged, b"cached\n")
    cached.chmod(0o644)
    cached.write_text("damage")
    outputs.put_into_cache("toy")
    assert cached.read_bytes() == b"cached\n"


@pytest.mark.parametrize(
    "config", [".dvc/config", ".dvc/config.local", "of the person/config", "of the machine/config"]
)
def test_nothing_is_put_into_the_project_where_a_setting_has_the_cache_elsewhere(staged, monkeypatch, config):
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(staged / "of the person"))
    monkeypatch.setenv("DVC_SYSTEM_CONFIG_DIR", str(staged / "of the machine"))
    shutil.rmtree(staged / ".dvc/cache")
    (staged / config).parent.mkdir(exist_ok=True)
    (staged / config).write_text("[cache]\n    dir = /elsewhere\n")
    outputs.put_into_cache("toy")
    assert not (staged / ".dvc/cache").exists()


def test_a_folder_is_put_into_the_cache_as_dvc_would(staged):
    outputs.restore("toy")
    cache = staged / ".dvc/cache/files/md5"
    by_dvc = {path.relative_to(cache): path.read_bytes() for path in cache.glob("??/*")}
    kept = {object_of(staged, b"kept\n").relative_to(cache): b"kept\n"}  # which DVC leaves to git
    shutil.rmtree(staged / ".dvc/cache")
    outputs.put_into_cache("toy")
    assert {path.relative_to(cache): path.read_bytes() for path in cache.glob("??/*")} == by_dvc | kept
    assert {path.stat().st_mode & 0o777 for path in cache.glob("??/*")} == {0o444}


def test_restore_takes_no_damaged_object_from_the_cache(toy):
    cached = object_of(toy, b"cached\n")
    cached.chmod(0o644)
    cached.write_text("damage\n")
    outputs.restore("toy")
    assert left() == {}


def test_restore_takes_nothing_from_git_that_dvc_did_not_record(toy):
    commit(toy, "Half of something else")
    outputs.restore("toy")
    assert left() == {}


@pytest.mark.usefixtures("toy")
def test_restore_leaves_what_is_there_already():
    KEPT.write_text("kept\n")
    before = KEPT.stat().st_mtime_ns
    outputs.restore("toy")
    assert left() == WHOLE
    assert KEPT.stat().st_mtime_ns == before


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("lock", [None, "", "stages: [", "schema: '2.0'\nstages:\n  other:\n    cmd: x\n"])
def test_restore_removes_what_no_lock_speaks_of(lock):
    Path("dvc.lock").unlink()
    if lock is not None:
        Path("dvc.lock").write_text(lock)
    outputs.restore("toy")
    assert left() == {}


@pytest.mark.parametrize("without", [".git", ".dvc"])
def test_restore_works_without_git_and_without_dvc(toy, without):
    shutil.rmtree(toy / without)
    outputs.restore("toy")
    assert left() == {}


def test_restore_takes_no_output_where_one_cannot_be_written(toy, monkeypatch):
    def full_disk(source, target):
        raise OSError(28, "No space left on device") if target.name == CACHED.name else shutil.copy(source, target)

    monkeypatch.setattr(outputs.shutil, "copyfile", full_disk)
    outputs.restore("toy")
    assert left() == {}


def test_check_cache_removes_damaged_objects_and_leaves_what_dvc_is_writing(toy, monkeypatch, caplog):
    monkeypatch.setattr(outputs, "WORKSPACE", toy)
    cached = object_of(toy, b"cached\n")
    whole = cached.read_bytes()
    being_written = cached.with_name(".tmp-half")
    being_written.write_bytes(b"half")
    outputs.check_cache()
    assert cached.read_bytes() == whole
    assert caplog.messages == []

    cached.chmod(0o644)
    cached.write_bytes(b"")
    outputs.check_cache()
    assert not cached.exists()
    assert being_written.exists()
    assert caplog.messages == [f"{cached} was damaged on the disk; it is removed and will be made again"]


def test_check_cache_reads_each_object_once(toy, monkeypatch):
    read = []
    monkeypatch.setattr(outputs, "WORKSPACE", toy)
    monkeypatch.setattr(outputs, "is_whole", lambda found: read.append(found) or True)
    outputs.check_cache()
    outputs.check_cache()
    assert sorted(read) == sorted((toy / ".dvc/cache/files/md5").glob("??/*"))


def test_check_cache_reads_next_time_what_came_while_it_was_at_work(toy, monkeypatch):
    read, late = [], object_of(toy, b"late\n")

    def is_whole(found):
        read.append(found)
        if not late.exists():
            time.sleep(0.02)  # the clock of files is coarser
            late.parent.mkdir(exist_ok=True)
            late.write_bytes(b"late\n")
            time.sleep(0.02)
        return True

    monkeypatch.setattr(outputs, "WORKSPACE", toy)
    monkeypatch.setattr(outputs, "is_whole", is_whole)
    outputs.check_cache()
    read.clear()
    outputs.check_cache()
    assert read == [late]


# a stage that fails


def outputs_of(clone: Path, *stages: str) -> dict[str, bytes | None]:
    """The content of every output of some stages, None where it is missing."""
    lock = YAML(typ="safe").load(clone / "dvc.lock")["stages"]
    paths = [clone / out["path"] for stage in stages or lock for out in lock[stage]["outs"]]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return {file.relative_to(clone).as_posix(): file.read_bytes() if file.is_file() else None for file in files}


def fail_between_two_writes(clone: Path) -> None:
    """Have render_grid fail when it has written its picture and not its page."""
    code = clone / "stages/render_grid.py"
    before = "    write_text("
    assert code.read_text().count(before) == 1
    code.write_text(code.read_text().replace(before, f'    raise RuntimeError("half done")\n{before}'))
    set_params(clone, {"grid.size": 4})


def test_a_stage_that_fails_after_its_first_write_puts_all_outputs_back(pipeline):
    before = outputs_of(pipeline)
    fail_between_two_writes(pipeline)
    assert run(pipeline, "dvc", "repro", check=False).returncode != 0
    assert outputs_of(pipeline) == before

    [child] = children(pipeline, main_run(pipeline))
    assert child.info.status == "FAILED"
    assert child.data.tags["reason"] == "render_grid: half done"
    assert main_run(pipeline).info.status == "FINISHED"


def test_a_stage_that_fails_after_its_first_write_leaves_no_output_where_one_is_nowhere(pipeline):
    shutil.rmtree(pipeline / ".dvc/cache")  # git has the picture; nothing else has the page
    fail_between_two_writes(pipeline)
    assert run(pipeline, "dvc", "repro", "--single-item", "render_grid", check=False).returncode != 0
    assert set(outputs_of(pipeline, "render_grid").values()) == {None}


def test_a_lost_output_of_a_failed_stage_comes_back_from_git_where_the_cache_is_empty(pipeline):
    shutil.rmtree(pipeline / ".dvc/cache")
    set_params(pipeline, {"samples.rows": 0})
    before = outputs_of(pipeline, "render_samples")
    assert run(pipeline, "dvc", "repro", "--single-item", "render_samples", check=False).returncode != 0
    assert outputs_of(pipeline, "render_samples") == before


# a cache that a power cut has damaged


def test_a_damaged_model_in_the_cache_is_removed_and_made_again(pipeline):
    before, model = outputs_of(pipeline), pipeline / "models/vae.safetensors"
    cached, content = object_of(pipeline, model.read_bytes()), model.read_bytes()
    model.unlink()
    cached.chmod(0o644)
    cached.write_bytes(b"")
    cached.chmod(0o444)  # which DVC takes to mean: it is whole
    set_params(pipeline, {"samples.rows": 1})

    said = run(pipeline, "dvc", "repro", check=False)
    assert (
        f"{cached.relative_to(pipeline)} was damaged on the disk; it is removed and will be made again" in said.stderr
    )
    assert "Traceback" not in said.stderr

    set_params(pipeline, {"samples.rows": 2})
    again = run(pipeline, "dvc", "repro")
    assert "train" in stages_run(again.stdout)
    assert outputs_of(pipeline) == before
    assert cached.read_bytes() == content


# a stage that is stopped

EPOCHS = 8


class Stop(NamedTuple):
    """What was found when a training had been stopped."""

    outputs: dict[str, bytes | None]
    run: Run
    status: int
    printed: str


def kept(clone: Path) -> list[int]:
    """What changes when training keeps an epoch."""
    return [path.stat().st_mtime_ns for path in clone.glob("checkpoints/*/last.ckpt")]


@contextmanager
def training(clone: Path) -> Iterator[tuple[subprocess.Popen, psutil.Process, Path]]:
    """`dvc repro train` when it has kept an epoch: DVC, the stage, and the file that has what they print."""
    log, before = clone.parent / "log", kept(clone)
    with log.open("w") as file:
        dvc = subprocess.Popen(
            ["dvc", "repro", "train"],
            cwd=clone,
            env=environment(clone),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in background
        )
    try:
        while kept(clone) == before:
            assert dvc.poll() is None, log.read_text()
            time.sleep(0.05)
        family = psutil.Process(dvc.pid).children(recursive=True)
        [stage] = (one for one in family if one.cmdline()[-3:] == ["-m", "stages", "train"])
        yield dvc, stage, log
    finally:
        dvc.kill()
        dvc.wait()


@pytest.fixture(scope="module")
def undisturbed(finished_pipeline, tmp_path_factory) -> dict[str, bytes | None]:
    """The outputs of a longer training that nothing disturbs."""
    clone = copy_workspace(finished_pipeline, tmp_path_factory.mktemp("undisturbed") / "vae")
    set_params(clone, {"train.epochs": EPOCHS})
    run(clone, "dvc", "repro", "train")
    return outputs_of(clone, "train")


@pytest.fixture(scope="module")
def disturbed(finished_pipeline, tmp_path_factory) -> Path:
    """A copy of the finished pipeline that is to train for longer."""
    clone = copy_workspace(finished_pipeline, tmp_path_factory.mktemp("disturbed") / "vae")
    set_params(clone, {"train.epochs": EPOCHS})
    return clone


@pytest.fixture(scope="module")
def stops(disturbed) -> dict[signal.Signals, Stop]:
    """One training, stopped by three signals in turn, each after another epoch at least."""
    found = {}
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        with training(disturbed) as (dvc, stage, log):
            stage.send_signal(number)
            status = dvc.wait(timeout=60)
            found[number] = Stop(outputs_of(disturbed, "train"), stored_runs(disturbed)[-1], status, log.read_text())
    return found


@pytest.fixture(scope="module")
def recovered(disturbed, stops) -> str:
    """What `dvc repro` prints when it is started at once after `kill -9` of the one before it."""
    with training(disturbed) as (dvc, stage, _):
        dvc.kill()
        dvc.wait()
        done = run(disturbed, "dvc", "repro", "train")
    gone, _ = psutil.wait_procs([stage], timeout=60)
    assert gone == [stage]
    return done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_training_in_order(stops, finished_pipeline, number):
    stop = stops[number]
    assert stop.status != 0
    assert "Traceback" not in stop.printed
    assert stop.outputs == outputs_of(finished_pipeline, "train")
    assert stop.run.info.status == "KILLED"
    assert stop.run.data.tags["reason"] == f"train: {number.name}"


def test_each_repro_resumes_where_the_one_before_was_stopped(stops):
    resumed = [re.search(r"resuming after epoch (\d+)", stop.printed) for stop in stops.values()]
    assert resumed[0] is None
    assert 1 <= int(resumed[1][1]) < int(resumed[2][1])


def test_a_training_that_was_stopped_four_times_ends_with_equal_bytes(recovered, disturbed, undisturbed):
    assert "resuming after epoch" in recovered
    assert outputs_of(disturbed, "train") == undisturbed
    assert list((disturbed / "checkpoints").iterdir()) == []


@pytest.mark.usefixtures("recovered")
def test_a_training_that_was_stopped_four_times_is_one_complete_run(disturbed):
    assert len(stored_runs(disturbed)) == 2  # that of the finished pipeline, and its own
    found = main_run(disturbed)
    assert found.info.status == "FINISHED"
    assert "reason" not in found.data.tags
    history = client_of(disturbed).get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, EPOCHS + 1))
