"""One journal on its way to one tracking store, metrics first, with the same result however often it is sent."""

import hashlib
import sys

from filelock import FileLock
from pydantic import BaseModel, Field

from mnist_vae.errors import DamagedFileError
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
)
from mnist_vae.tracking.store import Store, first_line, is_refusal, redact


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
        self.left_out: list[str] = []  # what the store has not received and never will, in words
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
            if self._is_lost({record.place for record, _ in records}):
                print(f"{self.journal.fingerprint}: its run is gone, all is sent again", file=sys.stderr)
                self.sent, self._seen = Sent(store=self.store.identity), {}
                records = list(self.journal.read())
            self._send_metrics([record for record, _ in records if isinstance(record, Metrics)])
            for record, offset in records:
                self._send_or_leave_out(record)
                self.sent.offset = offset
                if not isinstance(record, Metrics) or offset == records[-1][1]:
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

    def _is_lost(self, places: set[str]) -> bool:
        """Whether the training's run, or that of one of these places, was deleted meanwhile or has to go.

        It has to where another machine has made a run of the same training at the same time, and that one stays.
        """
        main = self.sent.runs.get(MAIN)
        if main is None:
            return False
        first = self.store.find_run(self.journal.fingerprint, MAIN)
        if first is not None and first.info.run_id == main:
            runs = {run_id for place, run_id in self.sent.runs.items() if place in places and run_id != main}
            return any(self.store.active_run(run_id) is None for run_id in runs)
        if first is not None and self.store.active_run(main) is not None:
            for run_id in set(self.sent.runs.values()):
                self.store.discard_run(run_id, first.info.run_id)
        return True

    def _send_or_leave_out(self, record: AnyRecord) -> None:
        """A record; what the store will never take is left out, so that it does not hold up all behind it."""
        try:
            self._send(record)
        except Exception as error:  # whatever MLflow raises
            if not (isinstance(error, DamagedFileError) or is_refusal(error)):
                raise
            if self.store.active_run(self._run(record.place, record.at)) is None:  # deleted meanwhile: all is sent anew
                raise
            self._leave_out(f"a record ({record.type}), which MLflow does not take: {first_line(error)}")

    def _leave_out(self, what: str) -> None:
        self.left_out.append(f"{what} (training {self.journal.fingerprint})")
        print(f"left out: {self.left_out[-1]}", file=sys.stderr)

    def _send(self, record: AnyRecord) -> None:
        """A record; metrics have been sent before, all together."""
        run_id = self._run(record.place, record.at)
        file = self.journal.find_payload(record.payload) if hasattr(record, "payload") else None
        match record:
            case Metrics():
                pass
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
                self._leave_out(f"{record.payload}, which is missing or damaged in {self.journal.folder}")
            case Image():
                self.store.log_image(run_id, file, record.key, record.step)
            case File():
                self.store.log_file(run_id, file, record.folder)
            case Description():
                self.store.describe(run_id, record.text, file)
            case Models():
                from mnist_vae.tracking.registry import register_models  # which needs torch

                main = self._run(MAIN, record.at)
                self.champion = register_models(self.store, main, file, record.measured_on, record.nll)

    def _send_metrics(self, records: list[Metrics]) -> None:
        """Metrics that their run does not have; a clone's journal of the same training may have told them before."""
        by_run: dict[str, list[Metrics]] = {}
        for record in records:
            by_run.setdefault(self._run(record.place, record.at), []).append(record)
        for run_id, told in by_run.items():
            if run_id not in self._seen:
                self._seen[run_id] = self.store.logged_metrics(run_id)
            seen = self._seen[run_id]
            points = [
                (name, value, record.step, record.at)
                for record in told
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
