"""The one judgement after every fault: is everything there, once, and equal to what an undisturbed run makes?"""

import json
import sqlite3
import struct
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML

from stages.outputs import hash_of
from tests.faults.lab import EPOCHS, Lab
from tools.clone import environment

SCRATCH = (".writing-*", ".mlflow.db-*", "mlflow.db-journal", "mlflow.db-wal", ".*.tmp", "tmp*")
MAY_CHANGE = ("metrics/", "plots/", "dvc.lock", "params.yaml")  # in the eyes of git
READY = 2  # MLflow's status of a logged model that is whole


def assert_whole(lab: Lab) -> None:
    """Assert that the clone is what it would be if nothing had happened."""
    lab.wait_for_quiet()
    assert_outputs_equal(lab)
    assert_cache_whole(lab.clone)
    assert_no_scratch(lab.clone)
    assert_git_clean(lab)
    with closing(sqlite3.connect(lab.store())) as store:
        assert store.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        run_id = assert_one_run(lab, store)
        assert_steps_once(store, run_id, lab.tellers)
        assert_champions_agree(store, run_id)
        assert_artifacts_equal(lab, store, run_id)


def assert_trained(lab: Lab) -> None:
    """Assert, after `dvc repro train`, that the training is what it would be if nothing had happened."""
    lab.wait_for_quiet()
    lab.sync().succeeded()
    assert_outputs_equal(lab, "train")
    with closing(sqlite3.connect(lab.store())) as store:
        assert_steps_once(store, assert_one_run(lab, store), lab.tellers)


def outputs(clone: Path, *names: str) -> dict[str, str]:
    """Path and MD5 of every output of the stages of these names, or of all, from dvc.lock."""
    stages = YAML(typ="safe", pure=True).load(clone / "dvc.lock")["stages"]
    return {out["path"]: out["md5"] for name in names or stages for out in stages[name]["outs"]}


def assert_outputs_equal(lab: Lab, *stages: str) -> None:
    """Every output, in dvc.lock and on the disk, has the hash that it has in the undisturbed run."""
    expected = outputs(lab.states / "finished", *stages)
    assert outputs(lab.clone, *stages) == expected
    found = {path: md5(lab.clone / path) if (lab.clone / path).exists() else "missing" for path in expected}
    assert found == expected


def assert_cache_whole(clone: Path) -> None:
    """Each object of DVC's cache has the content that its name says."""
    objects = [path for path in (clone / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    assert objects
    wrong = [path for path in objects if md5(path) != path.parent.name + path.name.removesuffix(".dir")]
    assert wrong == []


def assert_no_scratch(clone: Path) -> None:
    """Nothing half-made lies around, and there is nothing to resume."""
    left = [path for pattern in SCRATCH for path in clone.rglob(pattern) if path.name != "tmp"]  # .dvc/tmp is DVC's
    left += list(clone.glob("journal/*/payload/*/.*"))
    left += list(clone.glob(f"checkpoints/{fingerprint_of(clone)}*"))
    assert left == []


def assert_git_clean(lab: Lab) -> None:
    """What git sees as changed are outputs and parameters."""
    if (lab.clone / ".git").is_dir():
        # As the user who judges: git finds no repository below a folder that another user may not read.
        status = ["git", "-c", "safe.directory=*", "status", "--porcelain"]
        said = subprocess.run(status, cwd=lab.clone, env=environment(lab.clone), stdout=subprocess.PIPE, check=True)
        changed = [line[3:] for line in said.stdout.decode().splitlines()]
        assert [path for path in changed if not path.startswith(MAY_CHANGE)] == []


def assert_one_run(lab: Lab, store: sqlite3.Connection) -> str:
    """The training has one run, which is finished; no run is said to work. Its id."""
    runs = store.execute("SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'").fetchall()
    assert "RUNNING" not in {status for _, status in runs}, runs
    trainings: dict[str, list[str]] = {}
    main = "JOIN tags AS place USING (run_uuid) WHERE place.key = 'place' AND place.value = 'main'"
    named = f"SELECT name.value, run_uuid FROM tags AS name {main} AND name.key = 'fingerprint'"
    for fingerprint, run_id in store.execute(named):
        if run_id in dict(runs):
            trainings.setdefault(fingerprint, []).append(run_id)
    assert all(len(ids) == 1 for ids in trainings.values()), trainings
    assert len(trainings) == 1 + lab.other_trainings, trainings
    [run_id] = trainings[fingerprint_of(lab.clone)]
    assert dict(runs)[run_id] == "FINISHED"
    reason = store.execute("SELECT value FROM tags WHERE run_uuid = ? AND key = 'reason'", [run_id]).fetchall()
    assert reason in ([], [("",)]), reason
    return run_id


def assert_steps_once(store: sqlite3.Connection, run_id: str, tellers: int) -> None:
    """The run has each loss of each epoch once, or, of several who tell it at the same time, from each at most once."""
    for name in ("train/loss", "train/bce", "train/kld"):
        found = "SELECT step, count(*), count(DISTINCT value) FROM metrics WHERE run_uuid = ? AND key = ? GROUP BY step"
        steps = store.execute(f"{found} ORDER BY step", [run_id, name]).fetchall()
        assert [step for step, _, _ in steps] == list(range(1, EPOCHS + 1)), name
        assert all(points <= tellers and values == 1 for _, points, values in steps), (name, steps)


def assert_champions_agree(store: sqlite3.Connection, run_id: str) -> None:
    """Both aliases are on this run's models, and no model is half made."""
    versions = "model_versions USING (name) WHERE model_versions.version = alias.version"
    champions = store.execute(
        f"SELECT name, run_id FROM registered_model_aliases AS alias JOIN {versions} AND alias = 'champion'"
    ).fetchall()
    assert sorted(champions) == [("mnist-vae-decoder", run_id), ("mnist-vae-encoder", run_id)]
    of_run = "source_run_id = ? AND lifecycle_stage = 'active'"
    models = store.execute(f"SELECT name, status FROM logged_models WHERE {of_run}", [run_id]).fetchall()
    assert sorted(models) == [("decoder", READY), ("encoder", READY)]


def assert_artifacts_equal(lab: Lab, store: sqlite3.Connection, run_id: str) -> None:
    """The run has the bytes of every output but the data set, and a frame per epoch and teller."""
    [(uri,)] = store.execute("SELECT artifact_uri FROM runs WHERE run_uuid = ?", [run_id])
    folder = artifact_folder(lab, uri)
    expected = {path: md5 for path, md5 in outputs(lab.clone).items() if not path.startswith("data/")}
    found = {path: md5(folder / path) if (folder / path).is_file() else "missing" for path in expected}
    assert found == expected
    frames = sorted(path.name.partition("+timestamp")[0] for path in folder.glob("images/*.png"))
    epochs = [epoch for epoch in range(1, EPOCHS + 1) if epoch not in lab.lost_frames]
    assert sorted(set(frames)) == [f"samples+step+{epoch}" for epoch in epochs]
    assert len(frames) <= lab.tellers * len(epochs), frames


def artifact_folder(lab: Lab, uri: str) -> Path:
    """Where the artifacts of a run lie on this disk; a server keeps them beside its database."""
    if uri.startswith("mlflow-artifacts:"):
        return lab.store().parent / "artifacts" / urlsplit(uri).path.lstrip("/")
    return Path(unquote(urlsplit(uri).path))


def fingerprint_of(clone: Path) -> str:
    """The fingerprint in the metadata of the clone's model file."""
    with (clone / "models/vae.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    return str(json.loads(header["__metadata__"]["mnist-vae"])["fingerprint"])


def md5(path: Path) -> str:
    return hash_of(path)
