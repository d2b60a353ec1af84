"""The journal: what a training wants MLflow to know, written to this disk first.

One folder per training, named by its fingerprint:

    records.jsonl    one record per line, in order, only ever appended to, flushed to the disk
    payload/         the files that records speak of, each in a folder named by its content
    sent-….json      how far a tracking store has received it, one file per store (see sender.py)

A record belongs to a place: ``main`` is the run of the training, anything else a child run. A stage that runs again
with other parameters or other code writes to a place of its own, so nothing that was recorded is ever overwritten.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mnist_vae.files import flush_to_disk, writable

MAIN = "main"
LOCK_TIMEOUT_S = 30


class Record(BaseModel):
    """What all records have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: str = MAIN
    at: int = Field(default_factory=lambda: time.time_ns() // 1_000_000)  # milliseconds since 1970


class Begin(Record):
    """A stage begins. ``key`` tells what determines its results; ``process`` is the one that works."""

    type: Literal["begin"] = "begin"
    stage: str
    key: str
    name: str  # of the run
    tags: dict[str, str]
    params: dict[str, str]
    process: str


class Metrics(Record):
    """Numbers at a step."""

    type: Literal["metrics"] = "metrics"
    values: dict[str, float]
    step: int = 0


class Tags(Record):
    """Entries to filter runs by."""

    type: Literal["tags"] = "tags"
    tags: dict[str, str]


class Image(Record):
    """One frame of a slider: a gray image."""

    type: Literal["image"] = "image"
    key: str
    step: int
    payload: str


class File(Record):
    """A file, as an artifact in ``folder``."""

    type: Literal["file"] = "file"
    folder: str
    payload: str


class Trained(Record):
    """The data set that was trained on (``Dataset.about``)."""

    type: Literal["trained"] = "trained"
    about: dict[str, Any]


class Description(Record):
    """What a run's page shows first: a line of Markdown under a gray image."""

    type: Literal["description"] = "description"
    text: str
    payload: str


class Models(Record):
    """The model file, to be registered: measured on what, with what result in nats per image."""

    type: Literal["models"] = "models"
    payload: str
    measured_on: dict[str, str]
    nll: float


class End(Record):
    """A stage is over."""

    type: Literal["end"] = "end"
    stage: str
    process: str
    status: Literal["FINISHED", "FAILED", "KILLED"]
    reason: str = ""


AnyRecord = Begin | Metrics | Tags | Image | File | Trained | Description | Models | End
_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="type")])


class Journal:
    """The records of one training."""

    def __init__(self, workspace: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = workspace / "journal" / fingerprint, fingerprint
        self.path = self.folder / "records.jsonl"
        self._known: set[tuple[str, str, int]] = set()  # what may be there once, up to _offset
        self._offset = 0

    def lock(self) -> FileLock:
        """Held while something is appended; stages of parallel experiments may share a training."""
        return FileLock(self.folder / "lock", timeout=LOCK_TIMEOUT_S)

    def append(self, *records: AnyRecord) -> None:
        """Add records, without those that are there already, and flush them to the disk.

        There already means: a metric or an image of the same name, step and place. A training that was resumed, or
        run again, tells what it has told before.
        """
        with writable(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.lock():
                for known, self._offset in self.read(self._offset):
                    self._known.update(_identities(known))
                new = [left for record in records if (left := _without(record, self._known))]
                lines = [record.model_dump_json() for record in new]
                with self.path.open("ab") as file:
                    if not _ends_whole(self.path):  # a power cut left half a line
                        file.write(b"\n")
                    file.write("".join(f"{line}\n" for line in lines).encode())
                    file.flush()
                    os.fsync(file.fileno())
            flush_to_disk(self.folder)

    def read(self, offset: int = 0) -> Iterator[tuple[AnyRecord, int]]:
        """Records from an offset in bytes on, each with the offset behind it. Lines that are no records are skipped."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if not line.endswith(b"\n"):
                    return  # is still being written, or never was
                try:
                    yield _ADAPTER.validate_json(line), offset
                except ValidationError:
                    continue

    def keep(self, file: Path) -> str:
        """Copy a file into the payload; its name there."""
        return self.keep_bytes(file.name, file.read_bytes())

    def keep_bytes(self, name: str, content: bytes) -> str:
        """Write a file into the payload; its name there. Equal content is kept once."""
        payload = f"{hashlib.sha256(content).hexdigest()[:16]}/{name}"
        target = self.folder / "payload" / payload
        with writable(target):
            if not target.is_file() or target.stat().st_size != len(content):
                target.parent.mkdir(parents=True, exist_ok=True)
                scratch = target.with_name(f".{os.getpid()}-{name}")
                scratch.write_bytes(content)
                flush_to_disk(scratch)
                scratch.replace(target)
                flush_to_disk(target.parent)
        return payload

    def open_payload(self, payload: str) -> Path:
        """The path of a payload file."""
        return self.folder / "payload" / payload

    def place_of(self, stage: str, key: str) -> str:
        """Where a stage of this key belongs: the main run for the first key that was seen, else a child's."""
        first = next((r.key for r, _ in self.read() if isinstance(r, Begin) and r.stage == stage), key)
        return MAIN if first == key else f"{stage}-{key}"

    def open_stages(self) -> dict[str, Begin]:
        """The processes that have begun and not ended, by their name."""
        running: dict[str, Begin] = {}
        for record, _ in self.read():
            if isinstance(record, Begin):
                running[record.process] = record
            elif isinstance(record, End):
                running.pop(record.process, None)
        return running

    def remove(self) -> None:
        """Forget this training's journal."""
        shutil.rmtree(self.folder, ignore_errors=True)


def journals(workspace: Path) -> list[Journal]:
    """Every training that has a journal in a workspace."""
    return [Journal(workspace, folder.name) for folder in sorted((workspace / "journal").glob("*/"))]


def _identities(record: AnyRecord) -> list[tuple[str, str, int]]:
    """What may be in a journal once."""
    if isinstance(record, Metrics):
        return [(record.place, name, record.step) for name in record.values]
    return [(record.place, f"image {record.key}", record.step)] if isinstance(record, Image) else []


def _without(record: AnyRecord, known: set[tuple[str, str, int]]) -> AnyRecord | None:
    """A record without what is known; None where nothing is left."""
    if isinstance(record, Metrics):
        values = {name: v for name, v in record.values.items() if (record.place, name, record.step) not in known}
        return record.model_copy(update={"values": values}) if values else None
    return None if known.issuperset(_identities(record)) and isinstance(record, Image) else record


def _ends_whole(path: Path) -> bool:
    """Whether a file is empty or ends with a line feed."""
    size = path.stat().st_size if path.exists() else 0
    if size == 0:
        return True
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read() == b"\n"
