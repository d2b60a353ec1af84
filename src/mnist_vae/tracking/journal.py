"""The journal: what a training wants MLflow to know, written to this disk first.

One folder per training, named by its fingerprint:

    records.jsonl    one record per line, in order, only ever appended to, flushed to the disk
    payload/         the files that records speak of, each in a folder named by its content
    sent-….json      how far a tracking store has received it, one file per store (see delivery.py)

A record belongs to a place: ``main`` for the training itself, one more for each stage with each key (its parameters
and code). A stage that runs again with another key writes to another place, so nothing is ever overwritten.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mnist_vae.files import flush_to_disk, writable, write_bytes

MAIN = "main"
LOCK_TIMEOUT_S = 5


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

    def append(self, record: AnyRecord) -> None:
        """Add a record, without what is there already, and flush it to the disk.

        There already means: a metric or an image of the same name, step and place. A training that was resumed, or
        run again, tells what it has told before.

        Raises:
            UserError: the disk is full or read-only, or the folder is not ours to write to.
        """
        with writable(self.path):
            if not self.path.is_file():
                self._make()
            with self._alone(), self.path.open("ab") as file:
                if not _ends_whole(self.path):  # a power cut left half a line
                    file.write(b"\n")
                    file.flush()
                for known, offset in self.read(self._offset):
                    self._known.update(_identities(known))
                    self._offset = offset
                if new := _without(record, self._known):
                    file.write(f"{new.model_dump_json()}\n".encode())
                    file.flush()
                    os.fsync(file.fileno())

    def _make(self) -> None:
        """An empty journal that outlasts a power cut."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        for folder in (self.folder, self.folder.parent, self.folder.parent.parent):
            flush_to_disk(folder)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Take turns with other processes at the same training, but do not wait long for one that was stopped.

        A line goes to the end of the file in one piece without the lock too; it could only be there twice then.
        """
        lock = FileLock(self.folder / "lock")
        with suppress(Timeout):
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        try:
            yield
        finally:
            lock.release()  # does nothing where it is not held

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

    def is_behind_a_line(self, offset: int) -> bool:
        """Whether an offset is one that ``read`` could have given."""
        if offset == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(max(offset, 1) - 1)
            return file.read(1) == b"\n"

    def keep(self, file: Path) -> str:
        """Copy a file into the payload; its name there."""
        return self.keep_bytes(file.name, file.read_bytes())

    def keep_bytes(self, name: str, content: bytes) -> str:
        """Write a file into the payload; its name there. Equal content is kept once."""
        payload = f"{_digest(content)}/{name}"
        if self.find_payload(payload) is None:
            write_bytes(self.folder / "payload" / payload, content)
        return payload

    def find_payload(self, payload: str) -> Path | None:
        """The path of a payload file; None where it is missing or is not what was kept."""
        path = self.folder / "payload" / payload
        try:
            return path if _digest(path.read_bytes()) == path.parent.name else None
        except OSError:
            return None

    def open_stages(self) -> dict[str, Begin]:
        """The processes that have begun and not ended, by their name."""
        running: dict[str, Begin] = {}
        for record, _ in self.read():
            if isinstance(record, Begin):
                running[record.process] = record
            elif isinstance(record, End):
                running.pop(record.process, None)
        return running


def place_of(stage: str, key: str) -> str:
    """Where a stage's records belong; a stage without a key is the training itself."""
    return f"{stage}-{key}" if key else MAIN


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


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _ends_whole(path: Path) -> bool:
    """Whether a file is empty or ends with a line feed."""
    size = path.stat().st_size if path.exists() else 0
    if size == 0:
        return True
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read() == b"\n"
