"""The processes of one training: started, brought together, and ended together.

The first process (rank 0) decides, writes and reports; the others compute. On each host one process starts those beside
it, unless torchrun has started them all. They meet at a key-value store of torch's, which the first process holds at
MASTER_ADDR:MASTER_PORT. It tells each of them what the others are about, and why one of them has failed.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mnist_vae.errors import UserError
from mnist_vae.params import Train

PORT = 29_500  # where processes of several hosts meet; torchrun's default
JOIN_S = 600  # for all processes of all hosts to be there
ANSWER_S = 30  # for a process to take part in what all do together; then it, its host or the network counts as gone
REASON_S = 5  # for the reason of a failure to become known
POLL_S = 0.05  # between two looks at what others have done
END_S = 1  # for a process of this host to end in order; nothing of it stays
HINT_S = 5  # before the first process says whom it waits for
LOST_STATUS = 75  # of a process that ends because another one has; EX_TEMPFAIL of sysexits.h
FAILED = "failed"  # the store's key for the reason why the training ends
SIZE = "size"  # the store's key for what the first process expects


class ProcessLostError(UserError):
    """Another process of this training has ended, or cannot be reached any more."""


class Share(NamedTuple):
    """Which part of each mini-batch a process takes."""

    rank: int = 0
    processes: int = 1

    @property
    def is_all(self) -> bool:
        """Whether there is one process only."""
        return self.processes == 1

    def size(self, images: int) -> int:
        """How many of so many images are in it."""
        return images // self.processes + (self.rank < images % self.processes)

    def of(self, images: Tensor, dim: int = 0) -> Tensor:
        """This process's part of what has an entry per image along ``dim``; of few images it may have none."""
        return images if self.is_all else images.tensor_split(self.processes, dim)[self.rank]


ALL = Share()


def own_share() -> Share:
    """The part of this process among those that were brought together; all where none were."""
    return Share(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else ALL


class Place(NamedTuple):
    """Which process of a training this is."""

    rank: int
    processes: int  # on all hosts
    local_rank: int
    local_processes: int  # on this host
    is_launched: bool  # somebody else has started the processes of this host

    @property
    def name(self) -> str:
        """As messages have it, counted from 1."""
        return f"process {self.rank + 1} of {self.processes} (on {socket.gethostname()})"


def place(settings: Train, env: Mapping[str, str]) -> Place:
    """What parameters and environment say of this process. torchrun's environment decides, where there is one.

    Raises:
        UserError: a variable of the environment is no number, or does not fit the parameters.
    """
    if _number(env, "WORLD_SIZE", 1) > 1 and "RANK" in env:
        rank, processes = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        return Place(rank, processes, _number(env, "LOCAL_RANK"), _number(env, "LOCAL_WORLD_SIZE", 1), True)
    host, processes = _number(env, "NODE_RANK"), settings.nodes * settings.devices
    if host >= settings.nodes:
        raise UserError(
            f"NODE_RANK is {host} and params.yaml: train.nodes is {settings.nodes}; hosts are counted from 0, and all "
            "need the same parameters"
        )
    if settings.nodes > 1 and not env.get("MASTER_ADDR"):
        raise UserError(
            f"params.yaml: train.nodes is {settings.nodes}; set MASTER_ADDR on each host to the address of the first, "
            "and NODE_RANK on the others to 1, 2, … (docs/distributed.md)"
        )
    return Place(host * settings.devices, processes, 0, settings.devices, False)


def _number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    try:
        return int(env.get(name) or default)
    except ValueError as error:
        raise UserError(f"{name} in the environment is {env[name]!r}; it must be a whole number") from error


class Processes:
    """The processes of one training, as one of them sees them; with a single process nothing is started or joined."""

    def __init__(self, settings: Train, command: Sequence[str]) -> None:
        """``command`` starts another process beside this one, with an environment that tells it its place."""
        self.settings, self.command = settings, command
        self.place = place(settings, os.environ)
        self.children: list[subprocess.Popen[bytes]] = []
        self.store: Store | None = None
        self._port = _number(os.environ, "MASTER_PORT", PORT)
        self._is_over = threading.Event()

    @property
    def is_alone(self) -> bool:
        """Whether this is the only process."""
        return self.place.processes == 1

    @property
    def _is_on_cuda(self) -> bool:
        return self.settings.accelerator in ("auto", "gpu") and torch.cuda.is_available()

    def _size(self) -> str:
        """The parameters that say how many processes there are, in words."""
        return f"train.nodes {self.settings.nodes} and train.devices {self.settings.devices}"

    def start(self) -> None:
        """Start the other processes of this host, so that they load what they need while this one does.

        Raises:
            UserError: the port of the first process is taken.
        """
        if self.is_alone:
            return
        here = self.place
        if here.rank == 0 and not _is_store_of_torchrun():
            # A training on one host takes any free port: several may run side by side.
            self._port = self._port if self.settings.nodes > 1 or here.is_launched else 0
            self.store = self._serve()
            self.store.set(SIZE, self._size())
        if not here.is_launched:
            os.environ |= {
                "MASTER_ADDR": os.environ.get("MASTER_ADDR", "") if self.settings.nodes > 1 else "127.0.0.1",
                "MASTER_PORT": str(self._port),
                "WORLD_SIZE": str(here.processes),
                "LOCAL_WORLD_SIZE": str(here.local_processes),
            }
            for local_rank in reversed(range(here.local_processes)):  # this one last: its environment stays so
                os.environ |= {"RANK": str(here.rank + local_rank), "LOCAL_RANK": str(local_rank)}
                if local_rank:
                    # In a group of its own: Ctrl-C reaches this process, which ends the others.
                    child = subprocess.Popen(
                        self.command,
                        env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"},  # this one says what is to be said
                        stdin=subprocess.DEVNULL,
                        process_group=0,
                    )
                    self.children.append(child)
        os.environ.setdefault("OMP_NUM_THREADS", str(self.settings.threads))  # else Lightning sets torch's threads
        threading.Thread(target=self._watch, daemon=True).start()

    def join(self, about: Mapping[str, str]) -> None:
        """Wait for all processes, which must be ``about`` the same, and bring them together.

        Raises:
            UserError: a process has not come, has failed, or is about another training, or this host has too few GPUs.
        """
        if self.is_alone:
            return
        here = self.place
        store = self.store = self.store or self._reach()
        if self._is_on_cuda and here.local_processes > (gpus := torch.cuda.device_count()):
            raise UserError(
                f"{socket.gethostname()} has {gpus} GPU(s) for {here.local_processes} processes: lower train.devices "
                "(or torchrun's --nproc-per-node), or set train.accelerator to cpu"
            )
        own = {"host": socket.gethostname(), "about": dict(about)}
        store.set(f"process {here.rank}", json.dumps(own))
        records = [json.loads(store.get(key)) for key in self._wait_for_all(store, "process")]
        for rank, record in enumerate(records):
            if different := [name for name, value in about.items() if record["about"].get(name) != value]:
                ranks, hosts = sorted((rank, here.rank)), sorted({record["host"], own["host"]})
                raise UserError(
                    f"processes {ranks[0] + 1} and {ranks[1] + 1} (on {' and '.join(hosts)}) differ in "
                    f"{' and '.join(different)}: all hosts need the same commit, params.yaml, data and packages"
                )
        if self._is_on_cuda:
            torch.cuda.set_device(here.local_rank)
        else:
            name = _interface(os.environ["MASTER_ADDR"], self._port)
            if name:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        dist.init_process_group(
            "nccl" if self._is_on_cuda else "gloo",
            store=PrefixStore("group", store),
            rank=here.rank,
            world_size=here.processes,
            timeout=timedelta(seconds=ANSWER_S),
        )

    def leave(self) -> None:
        """Part from the others after a success; the first process, which holds the store, goes last."""
        if self.is_alone or self.store is None:
            return
        self.store.set(f"done {self.place.rank}", "")
        keys, deadline = [f"done {rank}" for rank in range(self.place.processes)], time.monotonic() + ANSWER_S
        while self.place.rank == 0 and not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_S)  # whoever is lost now has done its part
        self._is_over.set()
        dist.destroy_process_group()

    def explain(self, error: BaseException) -> BaseException:
        """What a failure of this process comes from; what is its own is told to the others."""
        if self.is_alone:
            return error
        if not (isinstance(error, ProcessLostError | dist.DistError) or "gloo" in str(error)):
            words = str(error).splitlines() if isinstance(error, UserError) else []
            self._tell(f"{self.place.name} failed: {(words or [type(error).__name__])[0]}")
            return error
        deadline = time.monotonic() + REASON_S
        while (reason := self._reason()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if reason:
            self._tell(reason)  # it may be known on this host only
        unknown = "a process, its host or the network between them is gone"
        reason = reason or (str(error) if isinstance(error, ProcessLostError) else unknown)
        return ProcessLostError(
            f"{reason}; the training has ended on all hosts; the next start goes on from the last finished epoch, with "
            "as many processes as you like"
        )

    def end(self) -> None:
        """See to it that no process of this host outlives this one."""
        self._is_over.set()
        for child in self.children:
            child.terminate()
        for child in self.children:
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _serve(self) -> TCPStore:
        try:
            store = TCPStore(
                "0.0.0.0", self._port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_S)
            )
        except RuntimeError as error:
            raise UserError(
                f"port {self._port} is taken; set MASTER_PORT to another one, the same on all hosts"
            ) from error
        self._port = store.port
        return store

    def _reach(self) -> Store:
        """The store of the first process, when it is there.

        Raises:
            UserError: it does not come, or expects another number of processes.
        """
        address, deadline = os.environ["MASTER_ADDR"], time.monotonic() + JOIN_S
        hint_at = time.monotonic() + HINT_S
        while True:  # not torch's own wait, which no signal ends
            try:
                socket.create_connection((address, self._port), timeout=2).close()
                break
            except OSError as error:
                now = time.monotonic()
                if now > deadline:
                    raise UserError(
                        f"the first process has not answered at {address}, port {self._port}, for {JOIN_S} s ({error})"
                    ) from error
                if now > hint_at:
                    print(f"waiting for the first process, at {address}, port {self._port}", file=sys.stderr)
                    hint_at = deadline + 1
                time.sleep(0.5)
        store = TCPStore(address, self._port, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_S))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if _is_store_of_torchrun():
            return PrefixStore(f"attempt {attempt}", store)
        self.store = store  # so that the others hear why this one ends
        if (size := store.get(SIZE).decode()) != self._size():
            raise UserError(
                f"params.yaml: the first host has {size}, and {socket.gethostname()} has {self._size()}: all hosts "
                "need the same"
            )
        return store

    def _wait_for_all(self, store: Store, what: str) -> list[str]:
        """The keys of all processes, when all have set them."""
        keys = [f"{what} {rank}" for rank in range(self.place.processes)]
        start, is_told = time.monotonic(), False
        while not store.check(keys):  # not torch's own wait, which no signal ends
            if reason := self._reason():
                raise ProcessLostError(reason)
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            seconds = time.monotonic() - start
            if seconds > JOIN_S:
                raise UserError(f"{len(missing)} of {len(keys)} processes have not come within {JOIN_S} s")
            if seconds > HINT_S and not is_told and self.place.rank == 0:
                self._ask_for(missing)
                is_told = True
            time.sleep(POLL_S)
        return keys

    def _ask_for(self, missing: Sequence[int]) -> None:
        """Say what is to be run on the hosts whose processes are missing."""
        hosts = sorted({rank // self.place.local_processes for rank in missing} - {0})
        if self.place.is_launched or not hosts:
            return
        print(
            f"waiting for {len(missing)} of {self.place.processes} processes; run on the other hosts", file=sys.stderr
        )
        variables = f"MASTER_ADDR={os.environ['MASTER_ADDR']} "
        variables += "" if self._port == PORT else f"MASTER_PORT={self._port} "
        for host in hosts:
            print(f"  {variables}NODE_RANK={host} python {' '.join(self.command[1:])}", file=sys.stderr)

    def _reason(self) -> str | None:
        """Why the training ends, if that is known by now."""
        if dead := self._dead_child():
            return self._child_in_words(dead)
        try:
            if self.store is not None and self.store.check([FAILED]):
                return str(self.store.get(FAILED).decode())
        except RuntimeError:
            return f"the first process, at {os.environ['MASTER_ADDR']}, has ended"
        return None

    def _dead_child(self) -> "subprocess.Popen[bytes] | None":
        """A process of this host that has ended before its time, and not because another one did."""
        return next((child for child in self.children if child.poll() not in (None, 0, LOST_STATUS)), None)

    def _child_in_words(self, child: subprocess.Popen[bytes]) -> str:
        rank, status = self.place.rank + self.place.local_processes - 1 - self.children.index(child), child.returncode
        with contextlib.suppress(RuntimeError):
            if self.store is not None and status > 0 and self.store.check([FAILED]):  # it has said more than its status
                return str(self.store.get(FAILED).decode())
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"process {rank + 1} of {self.place.processes} (on {socket.gethostname()}) {how}"

    def _tell(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):
            if self.store is not None and not self.store.check([FAILED]):
                self.store.set(FAILED, reason)

    def _watch(self) -> None:
        """Tell the other hosts of a process of this one that has ended, and end with it if nothing else does."""
        while not self._is_over.wait(0.5):
            if dead := self._dead_child():
                reason = self._child_in_words(dead)
                self._tell(reason)
                if not self._is_over.wait(ANSWER_S + REASON_S):  # a GPU's library may wait for the dead for ever
                    print(reason, file=sys.stderr)
                    for child in self.children:
                        child.kill()
                    os._exit(1)
                return


@contextmanager
def processes(settings: Train, command: Sequence[str]) -> Iterator[Processes]:
    """Start the processes that parameters and environment ask for, and see to their end.

    Raises:
        UserError: they cannot be started, or one of them was lost; its message says which, and what it ended of.
    """
    group = Processes(settings, command)
    try:
        group.start()
        yield group
        group.leave()
    except BaseException as error:
        explained = group.explain(error)
        if explained is error:
            raise
        raise explained from error
    finally:
        group.end()


def _is_store_of_torchrun() -> bool:
    """Whether torchrun holds the store, and not the first process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _interface(address: str, port: int) -> str | None:
    """The network interface by which this host reaches an address, or has it; None where that is unknown.

    Raises:
        UserError: the address has no route.
    """
    try:
        family, *_, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"MASTER_ADDR is {address}, which cannot be reached from here ({error})") from error
    found = (name for name, known in psutil.net_if_addrs().items() if any(one.address == own for one in known))
    return next(found, None)
