"""Processes by a name that no other process ever has: host, boot, number and start."""

import socket
from pathlib import Path

import psutil

from mnist_vae.files import is_alive


def process_name(pid: int | None = None) -> str:
    """The name of a process, by default of this one."""
    process = psutil.Process(pid)
    return f"{socket.gethostname()} {boot_id()} {process.pid} {_started(process.pid)}"


def is_gone(name: str) -> bool:
    """Whether the process of this name has ended; of another host's nothing is known, and it counts as alive."""
    host, *rest = name.split(" ")
    if host != socket.gethostname():
        return False
    if len(rest) != 3 or not rest[1].isdecimal() or rest[0] != boot_id():
        return True
    try:
        return _started(int(rest[1])) != rest[2]
    except (OSError, psutil.Error):
        return not is_alive(int(rest[1]))  # what is alive is hidden from this user


def boot_id() -> str:
    """What changes with each start of the machine."""
    linux = Path("/proc/sys/kernel/random/boot_id")
    return linux.read_text().strip() if linux.is_file() else f"{psutil.boot_time():.0f}"


def _started(pid: int) -> str:
    """When a process began: on Linux in ticks since the boot, which no change of the clock moves; "" for a zombie."""
    linux = Path(f"/proc/{pid}/stat")
    if not linux.is_file():
        return f"{psutil.Process(pid).create_time():.2f}"
    state, *values = linux.read_text().rpartition(")")[2].split()
    return "" if state in "ZX" else values[18]
