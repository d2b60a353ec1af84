"""The process beside a stage that sends the journal to MLflow.

    python -m mnist_vae.tracking.sender WORKSPACE STAGE PROCESS      started by a stage (session.py)
    python -m mnist_vae.tracking.sender WORKSPACE                    `make sync`: send all that is left

It reads the names of trainings from its standard input and follows their journals until the input ends, which it does
when the stage ends, however it ends. How far a store has received a journal stands in the journal's folder, so another
sender goes on where this one was killed; what is sent twice changes nothing. A store that does not take something now
is asked again, later and less often.
"""

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

from filelock import Timeout

from mnist_vae.tracking.delivery import Delivery
from mnist_vae.tracking.journal import MAIN, Begin, End, Journal, journals
from mnist_vae.tracking.process import is_gone
from mnist_vae.tracking.store import Store, database_of, first_line

POLL_S = 2  # between two looks at the journals
LAST_POLL_S = 0.1  # the same when the stage is over, and waits
PAUSES_S = (0.5, 1, 2, 5)  # before a store that failed is asked again; the last one from then on
LAST_S = 10  # when the stage is over: for another program at the store or the journal, and for what was left
LEAVE_S = 60  # when the stage is over, whatever a server does
SYSTEM_METRICS_S = 5  # between two samples of what the machine does
MONITOR_S = 2  # for its last ones to be sent
LOCKED = "database is locked"  # SQLite's words: another program has it for a moment
GONE = "its process ended without a word"


class Sender:
    """Follows the journals that it is told of, until its input ends."""

    def __init__(self, workspace: Path, stage: str, process: str, *followed: str) -> None:
        self.workspace, self.stage, self.process = workspace, stage, process
        self.followed = list(followed)
        self.closed = threading.Event()
        self.news = threading.Event()  # of another training, or that the input has ended
        self.store: Store | None = None
        self.database: tuple[int, int] | None = None
        self.deliveries: dict[str, Delivery] = {}
        self.champion: bool | None = None
        self.reason = ""  # why not everything is sent
        self.left_out: list[str] = []  # what will never be sent, in words
        self.monitor: Any = None
        self.monitored = ""  # run

    def listen(self) -> None:
        """Take down the names of trainings from the standard input."""
        for line in sys.stdin:
            self.followed.append(line.strip())
            self.news.set()
        self.closed.set()
        self.news.set()

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
            is_refused = failures > 1 and LOCKED not in self.reason
            if is_over and (is_refused or (is_swept and not self.reason) or time.monotonic() - over_since > LAST_S):
                break
            pause = (LAST_POLL_S if is_over else POLL_S) if is_swept or self.reason else 0
            if failures:
                pause = PAUSES_S[min(failures, len(PAUSES_S)) - 1]
            self.news.wait(pause)
            self.news.clear()
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
            try:
                delivery.send()
            finally:
                self.left_out += delivery.left_out
                delivery.left_out.clear()
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
            ending.join(MONITOR_S)
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
        return {"reason": self.reason, "left_out": self.left_out, "champion": self.champion}


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
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])  # for a process that follows this one
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
