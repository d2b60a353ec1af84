"""Trainings that are told to a journal, and what an MLflow store must hold of them.

A fresh store takes seconds to make, so tests copy one, with the folder of its artifacts changed to their own.
"""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mnist_vae.tracking.journal import (
    Begin,
    Description,
    End,
    File,
    Image,
    Journal,
    Metrics,
    Tags,
    Trained,
    place_of,
)
from mnist_vae.tracking.session import to_png
from mnist_vae.tracking.store import DATABASE, EXPERIMENT

REPOSITORY = Path(__file__).resolve().parent.parent
FINGERPRINT = "0123456789abcdef"
EPOCHS = (1, 2, 3)
ABOUT = {"name": "digits", "train_images": 9, "test_images": 3, "digest": "ab" * 32}
PROCESSES = {"train": "elsewhere boot 1 1", "evaluate": "elsewhere boot 2 2", "render_grid": "elsewhere boot 3 3"}


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment of a program that a test starts: this code, and no store but the workspace's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTEST_"))}
    paths = os.pathsep.join(map(str, (REPOSITORY / "src", REPOSITORY)))
    return kept | {"PYTHONPATH": paths, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | changes


def start(program: str, *arguments: object, **changes: str) -> subprocess.Popen[str]:
    """Start a program in a process group of its own; its name for the first argument is ``workspace``."""
    head = "import os, signal, sys, time; from pathlib import Path; workspace = Path(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + program, *map(str, arguments)],
        env=clean_environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(program: str, *arguments: object, **changes: str) -> str:
    """What a program prints; one that fails, fails the test with its errors."""
    process = start(program, *arguments, **changes)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed


def copy_store(template: Path, workspace: Path) -> Path:
    """Give a workspace a copy of another one's store."""
    workspace.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(template / DATABASE) as before, sqlite3.connect(workspace / DATABASE) as after:
        before.backup(after)
    before.close()
    after.close()
    relocate_store(template, workspace)
    return workspace


def copy_workspace(source: Path, target: Path) -> Path:
    """A copy of a workspace whose MLflow store says that artifacts are where they are now."""
    shutil.copytree(source, target, symlinks=True)
    relocate_store(source, target)
    return target


def relocate_store(before: Path, after: Path) -> None:
    """Have the store of a workspace that was copied name the new folder wherever it named the old one."""
    if not (after / DATABASE).exists():
        return
    with closing(sqlite3.connect(after / DATABASE)) as store, store:
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("logged_models", "artifact_location"),
            ("model_versions", "source"),
            ("model_versions", "storage_location"),
        ):
            store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (before.as_uri(), after.as_uri()))


def begin(stage: str, key: str = "", process: str = "", **params: str) -> Begin:
    """The first record of a stage."""
    return Begin(
        place=place_of(stage, key),
        stage=stage,
        key=key,
        name=f"{stage} {key}".strip(),
        tags={"told_by": stage},
        params={f"{stage}.{name}": value for name, value in params.items()},
        process=process or PROCESSES[stage],
    )


def end(stage: str, key: str = "", process: str = "", status: Any = "FINISHED", reason: str = "") -> End:
    """The last record of a stage."""
    process = process or PROCESSES[stage]
    return End(place=place_of(stage, key), stage=stage, process=process, status=status, reason=reason)


def tell_training(journal: Journal, process: str = "", epochs: tuple[int, ...] = EPOCHS) -> None:
    """A stage that trains: three epochs with a picture each."""
    journal.append(begin("train", process=process, epochs=str(len(EPOCHS))))
    journal.append(Trained(about=ABOUT))
    for epoch in epochs:
        journal.append(Metrics(values={"train/loss": 200.0 - epoch, "train/kld": 0.1 * epoch}, step=epoch))
        picture = np.full((28, 56), epoch, np.uint8)
        journal.append(Image(key="samples", step=epoch, payload=journal.keep_bytes("samples.png", to_png(picture))))
    journal.append(File(folder="plots", payload=journal.keep_bytes("losses.csv", b"epoch,loss\n")))
    journal.append(end("train", process=process))


def tell_grid(journal: Journal, key: str = "a", process: str = "") -> None:
    """A stage that draws; its key is its parameter, and stands in its picture."""
    place = place_of("render_grid", key)
    journal.append(begin("render_grid", key, process, size=key))
    png = to_png(np.full((28, 28), ord(key), np.uint8))
    description = journal.keep_bytes("description.png", png)
    journal.append(Description(place=place, text=f"A grid of {key}", payload=description))
    journal.append(File(place=place, folder="plots", payload=journal.keep_bytes("grid.png", png)))
    journal.append(Tags(place=place, tags={"warning": "none"}))
    journal.append(end("render_grid", key, process))


def tell(workspace: Path) -> Journal:
    """A training and a grid of it, by processes of which this host knows nothing."""
    journal = Journal(workspace, FINGERPRINT)
    tell_training(journal)
    tell_grid(journal)
    return journal


def runs(workspace: Path) -> list[dict[str, Any]]:
    """The active runs of a database, oldest first: name, status, tags, params, metrics (step and value by name)."""
    with sqlite3.connect(f"{(workspace / DATABASE).as_uri()}?mode=ro", uri=True, timeout=30) as database:
        database.row_factory = sqlite3.Row
        where = "where lifecycle_stage = 'active' order by start_time, name"
        found = [dict(row) for row in database.execute(f"select run_uuid as id, name, status from runs {where}")]
        for one in found:
            mine = f"where run_uuid = '{one['id']}'"
            for entry in ("tags", "params"):
                rows = database.execute(f"select key, value from {entry} {mine}")
                one[entry] = {row["key"]: row["value"] for row in rows}
            points = sorted(map(tuple, database.execute(f"select key, step, value from metrics {mine}")))
            one["metrics"] = [point for point in points if not point[0].startswith("system/")]
            one["machine"] = [point[:2] for point in points if point[0].startswith("system/")]
    database.close()
    return found


def artifacts(workspace: Path, run_id: str) -> dict[str, str]:
    """The artifacts of a run, each with a hash of what it holds."""
    folder = workspace / "mlruns" / EXPERIMENT / run_id / "artifacts"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def frames(workspace: Path, run_id: str) -> list[tuple[str, int, str]]:
    """Key, step and suffix of the images that a run's page shows."""
    names = [name.removeprefix("images/") for name in artifacts(workspace, run_id) if name.startswith("images/")]
    parts = [name.split("+") for name in names]
    return sorted((part[0], int(part[2]), Path(part[-1]).suffix) for part in parts)


def assert_complete(workspace: Path, stages: tuple[str, ...] = ("train", "render_grid")) -> str:
    """The store holds one run of what ``tell`` tells, all of it, each once; the run's id."""
    (found,) = [one for one in runs(workspace) if one["tags"].get("fingerprint") == FINGERPRINT]
    assert found["status"] == "FINISHED"
    assert "reason" not in found["tags"]
    if "train" in stages:
        assert (found["name"], found["tags"]["told_by"]) == ("train", "train")
        losses = [("train/loss", epoch, 200.0 - epoch) for epoch in EPOCHS]
        assert found["metrics"] == [*(("train/kld", epoch, 0.1 * epoch) for epoch in EPOCHS), *losses]
        assert frames(workspace, found["id"]) == [("samples", e, s) for e in EPOCHS for s in (".png", ".webp")]
        assert "plots/losses.csv" in artifacts(workspace, found["id"])
    if "render_grid" in stages:
        assert found["params"]["render_grid.size"] == "a"
        assert {"plots/grid.png", "description.png"} <= artifacts(workspace, found["id"]).keys()
        assert found["tags"]["mlflow.note.content"].endswith(f"run_uuid={found['id']})\n\nA grid of a")
    return str(found["id"])


def whole_content(workspace: Path) -> Any:
    """All that a database and its artifacts hold, with random names and the times at which it was sent left out."""
    database = sqlite3.connect(f"{(workspace / DATABASE).as_uri()}?mode=ro", uri=True)
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    ids = {row[0]: f"run {row[1]}" for row in database.execute("select run_uuid, name from runs")}
    ids |= {row[0]: f"model {row[1]}" for row in database.execute("select model_id, name from logged_models")}
    ids |= {row[0]: f"data {row[1]}" for row in database.execute("select dataset_uuid, name from datasets")}
    queries = (
        "select name, status, lifecycle_stage from runs",
        "select run_uuid, key, value, step from metrics where key not like 'system/%'",
        "select run_uuid, key, value, step from latest_metrics where key not like 'system/%'",
        "select run_uuid, key, value from params",
        "select run_uuid, key, value from tags",
        "select source_type, source_id, destination_type, destination_id from inputs",
        "select name, digest, dataset_profile from datasets",
        "select name, status, source_run_id from logged_models",
        "select name, version, run_id from model_versions",
        "select name, version, key, value from model_version_tags",
        "select name, alias, version from registered_model_aliases",
    )

    def known(text: object) -> str:
        for found, name in ids.items():
            text = str(text).replace(found, name)
        return str(text)

    rows = [sorted([known(value) for value in row] for row in database.execute(query)) for query in queries]
    database.close()
    root = workspace / "mlruns"
    files = {known(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return rows, files
