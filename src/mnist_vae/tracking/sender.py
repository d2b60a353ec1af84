"""The process beside a stage that sends the journal to MLflow.

    python -m mnist_vae.tracking.sender WORKSPACE STAGE PROCESS      started by a stage (session.py)
    python -m mnist_vae.tracking.sender WORKSPACE                    `make sync`: send all that is left

It reads the names of trainings from its standard input and follows their journals until the input ends, which it does
when the stage ends, however it ends. What it has sent stands in the journal's folder, so it goes on where another
sender was killed; sending twice changes nothing, since MLflow keeps what is equal once. A store that does not take
something now is asked again, later and less often.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Read while mlflow is imported. Its own retries would hide for minutes that a server is away.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import numpy as np
from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException

from mnist_vae.errors import UserError
from mnist_vae.files import write_json
from mnist_vae.tracking.journal import (
    MAIN,
    AnyRecord,
    Begin,
    Description,
    End,
    File,
    Image,
    Journal,
    Metrics,
    Models,
    Tags,
    Trained,
    journals,
)
from mnist_vae.tracking.process import is_gone
from mnist_vae.tracking.store import Store, first_line, redact

POLL_S = 0.1
PAUSES_S = (0.5, 1, 2, 5)  # before a store that failed is asked again; the last one from then on
SYSTEM_METRICS_S = 2  # between two samples of what the machine does
GONE = "its process ended without a word"


@dataclass
class Sent:
    """How far a store has received a journal."""

    offset: int = 0
    runs: dict[str, str] = field(default_factory=dict)  # id by place


class Delivery:
    """One journal on its way to one store."""

    def __init__(self, store: Store, journal: Journal) -> None:
        self.store, self.journal = store, journal
        self.lock = FileLock(journal.folder / "sender.lock", timeout=0)
        name = hashlib.sha256(redact(store.uri).encode()).hexdigest()[:8]
        self.path = journal.folder / f"sent-{name}.json"
        self.sent = Sent()
        self.champion: bool | None = None
        self._seen: dict[str, tuple[set[tuple[str, int]], set[tuple[str, int]]]] = {}  # metrics and images, by place

    def send(self) -> None:
        """Send what has come since the last time; one sender at a time, others come back later.

        Raises:
            Timeout: another sender is at it.
            Exception: whatever MLflow raises; what was sent before it is remembered.
        """
        with self.lock:
            self.sent = self._read_sent()
            for place, run_id in self.sent.runs.items():
                if self.store.active_run(run_id) is None:  # deleted meanwhile, or the whole store
                    self.sent, self._seen = Sent(), {}
                    print(f"run of {place} is gone, all is sent again", file=sys.stderr)
                    break
            for records, offset in _batches(self.journal.read(self.sent.offset)):
                self._send(records)
                self.sent.offset = offset
                write_json(self.path, {"offset": self.sent.offset, "runs": self.sent.runs})

    def pending(self) -> int:
        """Records that the store has not received."""
        return sum(1 for _ in self.journal.read(self._read_sent().offset))

    def _read_sent(self) -> Sent:
        try:
            content = json.loads(self.path.read_text())
            return Sent(int(content["offset"]), dict(content["runs"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Sent()

    def _send(self, records: list[AnyRecord]) -> None:
        """Records of one place: metrics in any number, or one other."""
        record = records[0]
        run_id = self._run(record)
        seen_metrics, seen_images = self._seen_of(record.place)
        match record:
            case Metrics():
                points = [
                    (name, value, one.step, one.at)
                    for one in records
                    if isinstance(one, Metrics)
                    for name, value in one.values.items()
                    if (name, one.step) not in seen_metrics
                ]
                self.store.log_metrics(run_id, points)
            case Begin():
                tags = record.tags | {"process": record.process, "mlflow.source.name": f"stages/{record.stage}.py"}
                self.store.log_params(run_id, record.params)
                self.store.set_tags(run_id, tags if record.stage == "train" or record.place != MAIN else {})
                if record.stage == "train":
                    self.store.client.update_run(run_id, status="RUNNING")
            case Image() if (record.key, record.step) not in seen_images:
                image = self._picture(record.payload)
                if image is not None:
                    self.store.client.log_image(
                        run_id, image, key=record.key, step=record.step, timestamp=record.at, synchronous=True
                    )
            case Tags():
                self.store.set_tags(run_id, record.tags)
            case File():
                with suppress(FileNotFoundError):
                    payload = self.journal.open_payload(record.payload)
                    payload.stat()
                    self.store.client.log_artifact(run_id, str(payload), artifact_path=record.folder)
            case Trained():
                self.store.log_dataset(run_id, record.about)
            case Description():
                image = self._picture(record.payload)
                if image is not None:
                    self.store.client.log_image(run_id, image, artifact_file="description.png")
                shown = f"![picture](get-artifact?path=description.png&run_uuid={run_id})"  # relative to MLflow's page
                self.store.set_tags(run_id, {"mlflow.note.content": f"{shown}\n\n{record.text}"})
            case Models():
                from mnist_vae.tracking.registry import register_models  # which needs torch

                payload = self.journal.open_payload(record.payload)
                main = self.sent.runs.get(MAIN, run_id)
                self.champion = register_models(self.store, main, payload, record.measured_on, record.nll)
            case End():
                self._end(run_id, record)

    def _end(self, run_id: str, record: End) -> None:
        """The run is finished when the last word of each of its stages is that it has finished."""
        last: dict[str, End | Begin] = {}
        for other, _ in self.journal.read():
            if isinstance(other, Begin | End) and other.place == record.place:
                last[other.stage] = other
        ends = [end for end in last.values() if isinstance(end, End) and end.status != "FINISHED"]
        reason = "; ".join(f"{end.stage}: {end.reason or end.status}" for end in ends)
        self.store.set_tags(run_id, {"reason": reason} if ends or record.status != "FINISHED" else {})
        self.store.end_run(run_id, ends[-1].status if ends else "FINISHED", record.at)

    def _run(self, record: AnyRecord) -> str:
        """The run of a record's place, made where there is none; a child's parent is made first."""
        if record.place in self.sent.runs:
            return self.sent.runs[record.place]
        parent = None if record.place == MAIN else self._run(record.model_copy(update={"place": MAIN}))
        begin = next((r for r, _ in self.journal.read() if isinstance(r, Begin) and r.place == record.place), None)
        name = begin.name if begin else f"training {self.journal.fingerprint}"
        run = self.store.find_run(self.journal.fingerprint, record.place)
        if run is None:
            run = self.store.create_run(self.journal.fingerprint, record.place, name, parent, record.at)
            self._seen[record.place] = (set(), set())
        self.sent.runs[record.place] = run.info.run_id
        return str(run.info.run_id)

    def _seen_of(self, place: str) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
        """Metrics and images that the place's run has, as they were when this sender came to it.

        MLflow would keep an equal metric once, but one that another journal of the same training told has another time.
        """
        if place not in self._seen:
            run = self.store.client.get_run(self.sent.runs[place])
            images = self.store.logged_images(run.info.run_id)
            self._seen[place] = (self.store.logged_metrics(run), images)
        return self._seen[place]

    def _picture(self, payload: str) -> Any:
        """A payload's pixels, None where it is missing or damaged: a picture is no reason to send nothing more."""
        from PIL import Image as Pillow

        try:
            return np.asarray(Pillow.open(self.journal.open_payload(payload)))
        except OSError:
            return None


def _batches(records: Iterable[tuple[AnyRecord, int]]) -> Iterator[tuple[list[AnyRecord], int]]:
    """Neighbouring metrics of one place together, all else one by one, each with the offset behind it."""
    batch: list[AnyRecord] = []
    end = 0
    for record, offset in records:
        joins = isinstance(record, Metrics) and batch and isinstance(batch[-1], Metrics)
        if batch and not (joins and batch[-1].place == record.place):
            yield batch, end
            batch = []
        batch.append(record)
        end = offset
    if batch:
        yield batch, end


class Sender:
    """Follows the journals that it is told of, until its input ends."""

    def __init__(self, workspace: Path, stage: str, process: str, *followed: str) -> None:
        self.workspace, self.stage, self.process = workspace, stage, process
        self.store: Store | None = None
        self.deliveries: dict[str, Delivery] = {}
        self.followed = list(followed)
        self.closed = threading.Event()
        self.database: tuple[int, int] | None = None
        self.reason = ""
        self.monitor: Any = None

    def listen(self) -> None:
        """Take down the names of trainings from the standard input."""
        for line in sys.stdin:
            self.followed.append(line.strip())
        self.closed.set()

    def run(self) -> None:
        """Send until the input has ended and nothing is left, or the store does not take it."""
        threading.Thread(target=self.listen, daemon=True).start()
        failures, backlog = 0, True
        while True:
            last_time = self.closed.is_set()
            if last_time:
                self.mark_dead_stage()
            try:
                self.open_store()
                for name in self.followed:
                    self.deliver(name)
                self.reason = ""
                if backlog and not last_time:
                    backlog = False
                    self.sweep()
                failures = 0
            except Timeout:
                self.reason = "another process is sending it"
            except Exception as error:  # whatever MLflow, its server or its database raise
                self.reason, failures = first_line(error), failures + 1
            if last_time:
                break
            self.closed.wait(PAUSES_S[min(failures, len(PAUSES_S)) - 1] if failures else POLL_S)
        if self.monitor is not None:
            self.monitor.finish()

    def open_store(self) -> None:
        """Open the store, again where its database has become another file."""
        if self.store is not None and not self.store.uri.startswith("sqlite:"):
            return
        if self.store is not None and _database_id(self.workspace) == self.database:
            return
        if self.store is not None:  # MLflow keeps the deleted file open as long as this process lives
            os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:4], *self.followed])
        self.store = Store(self.workspace)
        self.database = _database_id(self.workspace)
        if self.stage == "evaluate":  # load what registering needs while the stage works
            from mnist_vae.tracking import registry  # noqa: F401

    def deliver(self, name: str) -> None:
        """Send one training's journal."""
        assert self.store is not None
        if name not in self.deliveries:
            self.deliveries[name] = Delivery(self.store, Journal(self.workspace, name))
        delivery = self.deliveries[name]
        delivery.send()
        if self.stage == "train" and self.monitor is None and MAIN in delivery.sent.runs:
            self.monitor = _monitor(self.store, delivery.sent.runs[MAIN])

    def sweep(self) -> None:
        """Send what earlier stages left, and say of runs whose process is gone that they were killed."""
        assert self.store is not None
        mark_dead(self.workspace)
        for journal in journals(self.workspace):
            if journal.fingerprint not in self.followed:
                with suppress(Timeout):
                    Delivery(self.store, journal).send()
        for run in self.store.running():
            if (process := run.data.tags.get("process")) and is_gone(process):
                self.store.set_tags(run.info.run_id, {"reason": GONE})
                self.store.end_run(run.info.run_id, "KILLED", time.time_ns() // 1_000_000)

    def mark_dead_stage(self) -> None:
        """Where the stage ended without saying how, say it in its place."""
        for name in self.followed:
            journal = Journal(self.workspace, name)
            if begin := journal.open_stages().get(self.process):
                journal.append(_killed(begin))

    def summary(self) -> dict[str, Any]:
        """What a stage wants to know at its end."""
        pending = sum(delivery.pending() for delivery in self.deliveries.values())
        champion = [d.champion for d in self.deliveries.values() if d.champion is not None]
        return {"pending": pending, "reason": self.reason, "champion": champion[-1] if champion else None}


def mark_dead(workspace: Path) -> None:
    """Say in every journal which stages were killed together with their sender."""
    for journal in journals(workspace):
        for process, begin in journal.open_stages().items():
            if is_gone(process):
                journal.append(_killed(begin))


def _killed(begin: Begin) -> End:
    return End(place=begin.place, stage=begin.stage, process=begin.process, status="KILLED", reason=GONE)


def _database_id(workspace: Path) -> tuple[int, int] | None:
    """What tells the database from one that was made later under the same name."""
    try:
        found = (workspace / "mlflow.db").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _monitor(store: Store, run_id: str) -> Any:
    """MLflow's own record of what the machine does; None where it does not work."""
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(
            run_id, sampling_interval=SYSTEM_METRICS_S, resume_logging=True, tracking_uri=store.uri
        )
        monitor.start()
    except Exception:  # it is an extra
        return None
    return monitor


def sync(workspace: Path) -> int:
    """Send every journal of a workspace; the exit status, 0 if nothing is left."""
    mark_dead(workspace)
    left = 0
    try:
        store = Store(workspace)
        for journal in journals(workspace):
            delivery = Delivery(store, journal)
            try:
                delivery.send()
            except Timeout:
                print(f"sync: {journal.fingerprint}: another process is sending it", file=sys.stderr)
            except (MlflowException, OSError) as error:
                print(f"sync: {journal.fingerprint}: {first_line(error)}", file=sys.stderr)
            left += delivery.pending()
    except UserError as error:
        print(f"sync: {error}", file=sys.stderr)
        return 1
    print("MLflow has received everything." if not left else f"{left} records are not sent yet; try again later.")
    return int(left > 0)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the stage; what it says then is sent
    workspace = Path(sys.argv[1]).resolve()
    os.chdir(workspace)
    if len(sys.argv) == 2:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(sync(workspace))
    sender = Sender(workspace, *sys.argv[2:])
    sender.run()
    print(json.dumps(sender.summary()), flush=True)
    os._exit(0)  # MLflow's threads may hang on a server


if __name__ == "__main__":
    main()
