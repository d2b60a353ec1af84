"""The process beside a stage that sends the journal to MLflow.

    python -m mnist_vae.tracking.sender WORKSPACE STAGE PROCESS      started by a stage (session.py)
    python -m mnist_vae.tracking.sender WORKSPACE                    `make sync`: send all that is left

It reads the names of trainings from its standard input and follows their journals until the input ends, which it does
when the stage ends, however it ends. How far a store has received a journal stands in the journal's folder, so another
sender goes on where this one was killed; what is sent twice changes nothing. A store that does not take something now
is asked again, later and less often.
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
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field

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
from mnist_vae.tracking.store import Store, database_of, first_line, redact

POLL_S = 0.1
PAUSES_S = (0.5, 1, 2, 5)  # before a store that failed is asked again; the last one from then on
LAST_S = 10  # when the stage is over: for another process that is sending, and for what earlier stages left
LEAVE_S = 60  # when the stage is over, whatever a server does
SYSTEM_METRICS_S = 2  # between two samples of what the machine does
GONE = "its process ended without a word"


class Sent(BaseModel):
    """How far a store has received a journal."""

    store: str  # its identity: one that was made anew has received nothing
    offset: int = Field(default=0, ge=0)
    runs: dict[str, str] = {}  # id by place


class Delivery:
    """One journal on its way to one store."""

    def __init__(self, store: Store, journal: Journal) -> None:
        self.store, self.journal = store, journal
        self.lock = FileLock(journal.folder / "sender.lock")
        name = hashlib.sha256(redact(store.uri).encode()).hexdigest()[:8]
        self.path = journal.folder / f"sent-{name}.json"
        self.sent = Sent(store=store.identity)
        self.champion: bool | None = None
        self._seen: dict[str, set[tuple[str, int]]] = {}  # name and step of metrics, by run

    def send(self, patience: float = 0) -> None:
        """Send what has come since the last time; one sender at a time, others wait for it with this patience (s).

        Raises:
            Timeout: another sender is at it.
            Exception: whatever MLflow raises; what was sent before it is remembered.
        """
        if not self.pending():
            return
        self.store.check()
        with self.lock.acquire(timeout=patience):
            self.sent = self._read_sent()
            records = list(self.journal.read(self.sent.offset))
            if self._is_run_gone({MAIN, *(record.place for record, _ in records)}):
                print(f"{self.journal.fingerprint}: its run is gone, all is sent again", file=sys.stderr)
                self.sent, self._seen = Sent(store=self.store.identity), {}
                records = list(self.journal.read())
            for batch, offset in _batches(records):
                self._send(batch)
                self.sent.offset = offset
                write_json(self.path, self.sent.model_dump())

    def pending(self) -> int:
        """Records that the store has not received."""
        return sum(1 for _ in self.journal.read(self._read_sent().offset))

    def _read_sent(self) -> Sent:
        try:
            sent = Sent.model_validate_json(self.path.read_bytes())
            if sent.store == self.store.identity and self.journal.is_behind_a_line(sent.offset):
                return sent
        except (OSError, ValueError):
            pass
        return Sent(store=self.store.identity)

    def _is_run_gone(self, places: set[str]) -> bool:
        """Whether a run of these places was deleted meanwhile."""
        runs = {run_id for place, run_id in self.sent.runs.items() if place in places}
        return any(self.store.active_run(run_id) is None for run_id in runs)

    def _send(self, records: list[AnyRecord]) -> None:
        """Records of one place: metrics in any number, or one other."""
        record, run_id = records[0], self._run(records[0].place, records[0].at)
        file = self.journal.find_payload(record.payload) if hasattr(record, "payload") else None
        match record:
            case Metrics():
                self._send_metrics(run_id, [one for one in records if isinstance(one, Metrics)])
            case Begin():
                self._begin(run_id, record)
            case Tags():
                self.store.set_tags(run_id, record.tags)
            case Trained():
                self.store.log_dataset(run_id, record.about)
            case End():
                for run in {run_id, self._run(MAIN, record.at)}:
                    self._end(run, record.at)
            case _ if file is None:  # no reason to send nothing more
                print(f"{record.payload} is missing or damaged in {self.journal.folder}", file=sys.stderr)
            case Image():
                self.store.log_image(run_id, file, record.key, record.step, record.at)
            case File():
                self.store.client.log_artifact(run_id, str(file), record.folder)
            case Description():
                self.store.describe(run_id, record.text, file)
            case Models():
                from mnist_vae.tracking.registry import register_models  # which needs torch

                main = self._run(MAIN, record.at)
                self.champion = register_models(self.store, main, file, record.measured_on, record.nll)

    def _send_metrics(self, run_id: str, records: list[Metrics]) -> None:
        """Metrics that the run does not have; a clone's journal of the same training may have told them before."""
        if run_id not in self._seen:
            self._seen[run_id] = self.store.logged_metrics(run_id)
        seen = self._seen[run_id]
        points = [
            (name, value, record.step, record.at)
            for record in records
            for name, value in record.values.items()
            if (name, record.step) not in seen
        ]
        self.store.log_metrics(run_id, points)
        seen.update((name, step) for name, _, step, _ in points)

    def _begin(self, run_id: str, record: Begin) -> None:
        """What a run is about, and who works at it; a later stage of the training's run adds its parameters only."""
        self.store.log_params(run_id, record.params)
        is_subject = record.place == MAIN or run_id != self.sent.runs[MAIN]
        if is_subject:
            self.store.set_tags(run_id, record.tags | {"mlflow.source.name": f"stages/{record.stage}.py"})
        if is_subject or self.store.client.get_run(run_id).info.status == "RUNNING":
            self.store.set_tags(run_id, {"process": record.process})
            self.store.client.update_run(run_id, status="RUNNING")

    def _end(self, run_id: str, at: int) -> None:
        """A run has finished when the last process of each of its stages has, and failed where one of them has.

        Where a stage of the training's run failed, and has succeeded since with another key, that is no failure.
        """
        last: dict[str, str] = {}  # process by stage
        ends: dict[str, End] = {}  # by process
        for record, _ in self.journal.read():
            is_here = self.sent.runs.get(record.place) == run_id
            if isinstance(record, Begin) and is_here:
                last[record.stage] = record.process
            elif isinstance(record, End) and is_here:
                last.setdefault(record.stage, record.process)
                ends[record.process] = record
            elif isinstance(record, End) and run_id == self.sent.runs[MAIN] and record.status == "FINISHED":
                ends[last.get(record.stage, "")] = record
        if ends.keys() >= set(last.values()):  # else a stage was killed, and another process is at it
            bad = [ends[process] for process in last.values() if ends[process].status != "FINISHED"]
            reason = "; ".join(f"{end.stage}: {end.reason or end.status}" for end in bad)
            self.store.end_run(run_id, bad[-1].status if bad else "FINISHED", reason, at)

    def _run(self, place: str, at: int) -> str:
        """The run of a place.

        The training's run takes each stage's first key too; another key gets a child run. Which one was first, the
        run itself knows: other clones may have told the store of the same training.
        """
        if place not in self.sent.runs:
            main = "" if place == MAIN else self._run(MAIN, at)
            begin = next((r for r, _ in self.journal.read() if isinstance(r, Begin) and r.place == place), None)
            if main and begin and self.store.claim(main, f"{begin.stage}.key", begin.key):
                self.sent.runs[place] = main
            else:
                name = begin.name if begin else f"training {self.journal.fingerprint}"
                run = self.store.find_run(self.journal.fingerprint, place)
                run = run or self.store.create_run(self.journal.fingerprint, place, name, begin.at if begin else at)
                if main:
                    self.store.set_tags(run.info.run_id, {"mlflow.parentRunId": main})
                self.sent.runs[place] = run.info.run_id
        return self.sent.runs[place]


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
        self.followed = list(followed)
        self.closed = threading.Event()
        self.store: Store | None = None
        self.database: tuple[int, int] | None = None
        self.deliveries: dict[str, Delivery] = {}
        self.champion: bool | None = None
        self.reason = ""  # why not everything is sent
        self.monitor: Any = None
        self.monitored = ""  # run

    def listen(self) -> None:
        """Take down the names of trainings from the standard input."""
        for line in sys.stdin:
            self.followed.append(line.strip())
        self.closed.set()

    def run(self) -> None:
        """Send until the input has ended and nothing is left, or the store does not take it."""
        threading.Thread(target=self.listen, daemon=True).start()
        left: Iterator[str] | None = None
        failures, is_swept, over_since = 0, False, 0.0
        while True:
            if is_gone(self.process):  # a child of it may hold the input open
                self.closed.set()
            is_over = self.closed.is_set()
            if is_over and not over_since:
                over_since = time.monotonic()
                _leave_in(LEAVE_S)
            try:
                if is_over:
                    self.mark_dead_stage()
                store = self.open_store()
                self.deliver(store)
                failures, self.reason = 0, ""
                left = left or send_left_behind(store, self.followed)
                is_swept = next(left, None) is None
            except Timeout:
                self.reason = "another process is sending it"
            except Exception as error:  # whatever MLflow, its server or its database raise
                failures, self.reason = failures + 1, first_line(error)
                self.store, self.deliveries = None, {}
            if is_over and (failures > 1 or (is_swept and not self.reason) or time.monotonic() - over_since > LAST_S):
                break
            pause = PAUSES_S[min(failures, len(PAUSES_S)) - 1] if failures else POLL_S
            time.sleep(pause) if is_over else self.closed.wait(pause)
        self.watch_machine(None, "")

    def open_store(self) -> Store:
        """Open the store, in a new process where its database has become another file.

        MLflow keeps a deleted file open for as long as its process lives.
        """
        found = _file_id(database_of(self.workspace))
        if self.database not in (None, found):
            arguments = [str(self.workspace), self.stage, self.process, *self.followed]
            os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *arguments])
        if self.store is None:
            try:
                self.store = Store(self.workspace)
            finally:
                self.database = _file_id(database_of(self.workspace))
            if self.stage == "evaluate":  # load what registering needs while the stage works
                from mnist_vae.tracking import registry  # noqa: F401
        return self.store

    def deliver(self, store: Store) -> None:
        """Send the journals that are followed."""
        for name in self.followed:
            if name not in self.deliveries:
                self.deliveries[name] = Delivery(store, Journal(self.workspace, name))
            delivery = self.deliveries[name]
            delivery.send()
            if delivery.champion is not None:
                self.champion = delivery.champion
            if self.stage == "train" and MAIN in delivery.sent.runs and not self.closed.is_set():
                self.watch_machine(store, delivery.sent.runs[MAIN])

    def watch_machine(self, store: Store | None, run_id: str) -> None:
        """Have MLflow record what the machine does while a run lasts; an extra that may fail."""
        if run_id == self.monitored:
            return
        if self.monitor is not None:  # it may wait for a server
            ending = threading.Thread(target=self.monitor.finish, daemon=True)
            ending.start()
            ending.join(SYSTEM_METRICS_S)
        self.monitor, self.monitored = None, run_id
        if store is not None and run_id:
            with suppress(Exception):
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                self.monitor = SystemMetricsMonitor(
                    run_id, sampling_interval=SYSTEM_METRICS_S, resume_logging=True, tracking_uri=store.uri
                )
                self.monitor.start()

    def mark_dead_stage(self) -> None:
        """Where the stage ended without saying how, say it in its place."""
        for name in self.followed:
            journal = Journal(self.workspace, name)
            if begin := journal.open_stages().get(self.process):
                journal.append(_killed(begin))

    def summary(self) -> dict[str, Any]:
        """What a stage wants to know at its end."""
        return {"reason": self.reason, "champion": self.champion}


def send_left_behind(store: Store, but: Iterable[str] = (), patience: float = 0) -> Iterator[str]:
    """Send what earlier stages left; for each training that had something left, why it is still not sent, or "".

    Runs whose process is gone have been killed.
    """
    mark_dead(store.workspace)
    for journal in journals(store.workspace):
        delivery = Delivery(store, journal)
        if journal.fingerprint not in but and delivery.pending():
            try:
                delivery.send(patience)
                yield ""
            except Timeout:
                yield f"{journal.fingerprint}: another process is sending it"
            except Exception as error:  # whatever MLflow raises; the next one may be sent
                yield f"{journal.fingerprint}: {first_line(error)}"
    for run in store.running():
        if (process := run.data.tags.get("process")) and is_gone(process):
            store.end_run(run.info.run_id, "KILLED", GONE, time.time_ns() // 1_000_000)


def mark_dead(workspace: Path) -> None:
    """Say in every journal which stages were killed together with their sender."""
    for journal in journals(workspace):
        gone = [process for process in journal.open_stages() if is_gone(process)]
        still_open = journal.open_stages() if gone else {}  # one of them may have ended in order just before
        for process in gone:
            if process in still_open:
                journal.append(_killed(still_open[process]))


def _killed(begin: Begin) -> End:
    return End(place=begin.place, stage=begin.stage, process=begin.process, status="KILLED", reason=GONE)


def _file_id(path: Path | None) -> tuple[int, int] | None:
    """What tells a file from one that was made later under the same name; None where there is none."""
    if path is None or not path.exists():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino


def _leave_in(seconds: float) -> None:
    """End this process after a while, whatever it waits for then."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


def sync(workspace: Path) -> int:
    """Send every journal of a workspace; the exit status, 0 if nothing is left."""
    if not journals(workspace):
        print("There is no journal here, so there is nothing to send.")
        return 0
    try:
        reasons = [reason for reason in send_left_behind(Store(workspace), patience=LAST_S) if reason]
    except Exception as error:  # the store does not open, or the disk is full
        reasons = [first_line(error)]
    for reason in reasons:
        print(f"sync: {reason}", file=sys.stderr)
    if not reasons:
        print("MLflow has received everything.")
    return int(bool(reasons))


def main() -> None:
    workspace = Path(sys.argv[1]).resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # which may be relative, for a process that follows this one
    os.chdir(workspace)
    if len(sys.argv) == 2:
        try:
            sys.exit(sync(workspace))
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the stage; what it says then is sent
    sender = Sender(workspace, *sys.argv[2:])
    sender.run()
    print(json.dumps(sender.summary()), flush=True)
    os._exit(0)  # MLflow's threads may hang on a server


if __name__ == "__main__":
    main()
