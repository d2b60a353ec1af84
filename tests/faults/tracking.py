"""MLflow's store: locked, read-only, gone, damaged, killed while it was made; its server away, slow or lying."""

import json
import shutil
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

import requests

from tests.faults.lab import EPOCHS, Command, Lab, needs
from tests.pipeline import environment
from tests.servers import Answer, serve
from tools.deployment import free_port

SLOW = {"at": "mnist_vae.training.module:VAETraining.on_train_epoch_start", "call": 0, "do": "sleep 3"}
NOT_SENT = "MLflow has not received everything"


def unsent(lab: Lab) -> None:
    """A clone whose training MLflow knows nothing of: all is in the journal."""
    lab.begin("trained")
    forget(lab)


def forget(lab: Lab) -> None:
    """Remove the store and the notes of what it has received."""
    for left in (*lab.clone.glob("mlflow.db*"), *lab.clone.glob("journal/*/sent-*.json")):
        left.unlink()
    shutil.rmtree(lab.clone / "mlruns", ignore_errors=True)


# a database in the workspace


@contextmanager
def training(lab: Lab, epoch: int = 1) -> Iterator[Command]:
    """`dvc repro train`, slowed down, from the moment when MLflow has an epoch of it to its end."""
    lab.begin("downloaded")
    running = lab.start("dvc", "repro", "train", env=lab.rules(SLOW))
    lab.wait_for(lambda: lab.store().exists() and sent_epochs(lab) >= epoch, f"epoch {epoch} in the store")
    yield running
    running.wait().succeeded()


def sent_epochs(lab: Lab) -> int:
    try:
        return len(lab.sql("SELECT step FROM metrics WHERE key = 'train/loss'"))
    except sqlite3.Error:
        return 0


def locked(lab: Lab) -> None:
    with training(lab) as running, closing(sqlite3.connect(lab.store(), timeout=30, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        running.wait().succeeded().says(NOT_SENT, "locked")


def read_only(lab: Lab) -> None:
    needs("chattr")
    with training(lab) as running:
        lab.stack.callback(lab.run, "chattr", "-i", lab.store())
        lab.run("chattr", "+i", lab.store()).succeeded()
        running.wait().succeeded().says(NOT_SENT)
    lab.run("chattr", "-i", lab.store()).succeeded()


def deleted(lab: Lab) -> None:
    with training(lab):
        for file in lab.clone.glob("mlflow.db*"):
            file.unlink()


def moved_with_artifacts(lab: Lab) -> None:
    with training(lab):
        shutil.rmtree(lab.clone / "mlruns")
        (lab.clone / "mlflow.db").unlink()


def run_deleted(lab: Lab) -> None:
    with training(lab):
        lab.sql("UPDATE runs SET lifecycle_stage = 'deleted'")


def damaged(lab: Lab) -> None:
    lab.begin("trained")
    with lab.store().open("r+b") as file:
        file.write(lab.random.randbytes(4096))
    lab.repro().says(NOT_SENT, "move mlflow.db away")
    lab.store().rename(lab.clone / "mlflow.db.damaged")
    lab.sync().succeeded()
    (lab.clone / "mlflow.db.damaged").unlink()


def damaged_inside(lab: Lab) -> None:
    """Pages in the middle, which opening the store does not read."""
    lab.begin("trained")
    with lab.store().open("r+b") as file:
        size = lab.store().stat().st_size
        for page in range(8, size // 4096):
            file.seek(4096 * page)
            file.write(lab.random.randbytes(4096))
    lab.repro().says(NOT_SENT)
    lab.store().unlink()
    lab.sync().succeeded()


def emptied(lab: Lab) -> None:
    lab.begin("trained")
    lab.store().write_bytes(b"")
    lab.repro().says(NOT_SENT, "move mlflow.db away")
    lab.store().unlink()
    lab.sync().succeeded()


def newer_schema(lab: Lab) -> None:
    lab.begin("trained")
    [(version,)] = lab.sql("SELECT version_num FROM alembic_version")
    lab.sql("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    lab.repro().says(NOT_SENT)
    lab.sql("UPDATE alembic_version SET version_num = ?", version)
    lab.sync().succeeded()


def experiment_deleted(lab: Lab) -> None:
    lab.begin("trained")
    [(experiment,)] = lab.sql("SELECT experiment_id FROM experiments WHERE name = 'mnist-vae'")
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{lab.store()}"}
    lab.run("mlflow", "experiments", "delete", "--experiment-id", str(experiment), env=store).succeeded()
    remedy = f"mlflow experiments restore --experiment-id {experiment}"
    lab.repro().says(NOT_SENT, remedy)
    lab.run(*remedy.split(), env=store).succeeded()
    lab.sync().succeeded()


def killed_while_made(lab: Lab) -> None:
    """Killed at the N-th of the statements that make a store, for eight N."""
    unsent(lab)
    for left in range(8, 0, -1):
        rule = {"at": "sqlalchemy.engine.default:DefaultDialect.do_execute", "do": "SIGKILL"}
        said = lab.sync(env=lab.rules({**rule, "call": lab.random.randint(1, 1000)}))
        lab.assert_interfered()
        said.failed()
        if left > 1:
            unsent(lab) if lab.random.random() < 0.5 else None  # or go on with what is left of the last attempt
    lab.sync().succeeded()


def killed_while_sending(lab: Lab) -> None:
    """Killed when it has sent something and not noted it, again and again, a record further each time."""
    unsent(lab)
    attempts = 0
    rule = {"at": "mnist_vae.tracking.delivery:write_json", "given": "sent-", "call": 2, "do": "SIGKILL"}
    while lab.sync(env=lab.rules(rule)).status != 0:
        lab.assert_interfered()
        attempts += 1
    assert attempts > 5


def disk_full_for_store(lab: Lab) -> None:
    """The store on a disk of its own, which is full."""
    needs("unshare", "mount")
    lab.begin("downloaded")
    folder = lab.folder / "small"
    folder.mkdir()
    in_small = f"mount -t tmpfs -o size=300k none '{folder}' && exec dvc repro train"
    uri = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    lab.run("unshare", "-m", "sh", "-c", in_small, env=uri).succeeded().says(NOT_SENT)


def stopped_sender(lab: Lab) -> None:
    """The sender is stopped, as with `kill -STOP`: the stage waits a bounded time."""
    lab.begin("downloaded")
    running = lab.start("dvc", "repro", "train", env=lab.rules(SLOW))
    sender = lab.sender_of("train")
    lab.wait_for_epoch(1)
    sender.suspend()
    lab.wait_for_epoch(EPOCHS)
    over = time.monotonic()
    running.wait().succeeded().says(NOT_SENT)
    assert time.monotonic() - over < 60


# the journal


def notes_of_sender(content: str) -> Callable[[Lab], None]:
    """What the sender noted of what it has sent is something else."""
    return partial(_notes_of_sender, content=content)


def _notes_of_sender(lab: Lab, content: str) -> None:
    lab.begin("trained")
    for notes in lab.clone.glob("journal/*/sent-*.json"):
        before = json.loads(notes.read_text())
        notes.write_text(content % before if "%" in content else content)


def half_a_line(lab: Lab) -> None:
    """A power cut while a line of the journal was written leaves half of it."""
    lab.begin("downloaded")
    running = lab.start("dvc", "repro", "train", env=lab.rules(SLOW))
    lab.wait_for_epoch(2)
    running.end()
    lab.wait_for_quiet()
    [journal] = lab.clone.glob("journal/*/records.jsonl")
    line = journal.read_bytes().splitlines()[-2]
    with journal.open("ab") as file:
        file.write(line[: len(line) // 2])
    lab.next_says = ("resuming after epoch",)


def payload_missing(lab: Lab) -> None:
    """A picture that was to be sent is gone: MLflow does not get it, and gets everything else."""
    unsent(lab)
    [frame] = {record["payload"] for record in lab.records() if record["type"] == "image" and record["step"] == 2}
    [path] = lab.clone.glob(f"journal/*/payload/{frame}")
    path.unlink()
    lab.lost_frames = (2,)


def payload_damaged(lab: Lab) -> None:
    unsent(lab)
    [path] = lab.clone.glob("journal/*/payload/*/vae.safetensors")
    path.write_bytes(path.read_bytes()[:1000])


def journal_deleted(lab: Lab) -> None:
    with training(lab, epoch=2):
        (lab.clone / "journal").rename(lab.folder / "gone")  # at once, while its sender writes there


# a server


class Server:
    """MLflow's own server on a database of its own, behind a proxy whose address stays."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.folder = lab, lab.folder / "server"
        self.folder.mkdir()
        lab.database = self.folder / "mlflow.db"
        self.proxy = lab.stack.enter_context(Proxy())
        lab.env["MLFLOW_TRACKING_URI"] = self.proxy.url
        lab.env["no_proxy"] = "127.0.0.1"
        self.command: Command | None = None
        lab.stack.callback(self.kill)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        port = free_port()
        argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        argv += ["--backend-store-uri", f"sqlite:///{self.lab.database}", "--serve-artifacts"]
        argv += ["--artifacts-destination", str(self.folder / "artifacts")]
        env = environment(self.folder)
        self.command = Command(argv, self.folder, env, self.lab.folder / f"server-{port}.txt")
        self.lab.wait_for(lambda: is_healthy(port), "MLflow's server", 120)
        self.proxy.target = port

    def kill(self) -> None:
        """End it, so that nobody answers at its address."""
        self.proxy.target = None
        if self.command is not None:
            self.command.end()
            self.command = None


class Proxy:
    """A TCP proxy on a port of its own: passes on to ``target``, refuses where there is none, or hangs."""

    def __init__(self) -> None:
        self.target: int | None = None
        self.mode = "pass"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        self.closing = False

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing = True
        self.listener.close()
        self.drop()

    def drop(self) -> None:
        """Break off every connection."""
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def accept(self) -> None:
        while not self.closing:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(client)
            if self.mode == "hang":
                continue
            if self.target is None or self.mode == "reset":
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            self.connections.append(server)
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self.pump, args=(one, other), daemon=True).start()

    def pump(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while content := one.recv(65536):
                while self.mode == "hang" and not self.closing:
                    time.sleep(0.1)
                other.sendall(content)
        except OSError:
            pass
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def is_healthy(port: int) -> bool:
    session = requests.Session()
    session.trust_env = False
    try:
        return session.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
    except requests.RequestException:
        return False


def server_away(lab: Lab) -> None:
    """Nobody answers while training lasts; later the server is there."""
    lab.begin("downloaded")
    server = Server(lab)
    said = lab.repro("train").says(NOT_SENT)
    assert said.text.count(NOT_SENT) == 1
    server.start()


def server_restarted(lab: Lab) -> None:
    """Killed and started again twice, and hanging once, in one training."""
    lab.begin("downloaded")
    server = Server(lab)
    server.start()
    running = lab.start("dvc", "repro", "train", env=lab.rules(SLOW))
    for epoch in (1, 2):
        lab.wait_for_epoch(epoch)
        server.kill()
        server.proxy.drop()
        server.start()
    server.proxy.mode = "hang"
    lab.wait_for_epoch(EPOCHS)
    server.proxy.mode = "pass"
    running.wait().succeeded()


def server_hangs(lab: Lab) -> None:
    """It takes connections and never answers again: a stage waits a bounded time."""
    lab.begin("downloaded")
    server = Server(lab)
    server.start()
    running = lab.start("dvc", "repro", "train")
    lab.wait_for_epoch(1)
    server.proxy.mode = "hang"
    lab.wait_for_epoch(EPOCHS)
    over = time.monotonic()
    running.wait().succeeded().says(NOT_SENT)
    assert time.monotonic() - over < 60
    server.proxy.mode = "pass"
    server.proxy.drop()


def server_resets(lab: Lab) -> None:
    """Connections break off again and again."""
    lab.begin("downloaded")
    server = Server(lab)
    server.start()
    running = lab.start("dvc", "repro", "train", env=lab.rules(SLOW))
    while running.process.poll() is None:
        server.proxy.drop()
        time.sleep(lab.random.uniform(0.05, 1))
    running.wait().succeeded()


def server_says(*answers: Answer) -> Callable[[Lab], None]:
    """Another program answers at the server's address."""
    return partial(_server_says, answers=answers)


def _server_says(lab: Lab, answers: tuple[Answer, ...]) -> None:
    lab.begin("downloaded")
    with serve(*answers) as server:
        env = {"MLFLOW_TRACKING_URI": server.url, "no_proxy": "127.0.0.1"}
        lab.repro("train", env=env).says(NOT_SENT)


# secrets

PASSWORD = "correct-horse%40battery"


def password_in(uri: str) -> Callable[[Lab], None]:
    """An address with a password, at which nobody answers."""
    return partial(_password_in, uri=uri)


def _password_in(lab: Lab, uri: str) -> None:
    lab.begin("downloaded")
    address = uri.format(password=PASSWORD, port=free_port())
    said = lab.repro("train", env={"MLFLOW_TRACKING_URI": address}).says(NOT_SENT)
    told = lab.sync(env={"MLFLOW_TRACKING_URI": address}).failed()
    secrets = (PASSWORD, PASSWORD.replace("%40", "@"))
    lab.repro()
    files = [path for folder in ("journal", "models", "metrics", "mlruns") for path in (lab.clone / folder).rglob("*")]
    texts = [said.text, told.text] + [
        path.read_text(errors="replace")
        for path in [*files, lab.clone / "dvc.lock", lab.clone / "mlflow.db"]
        if path.is_file()
    ]
    assert not [text for text in texts for secret in secrets if secret in text]
