"""Processes by a name that no other process ever has: host, boot, number and start."""

import socket
from pathlib import Path

import psutil


def process_name(process: psutil.Process | None = None) -> str:
    """The name of a process, by default of this one."""
    process = process or psutil.Process()
    return f"{socket.gethostname()} {boot_id()} {process.pid} {process.create_time():.2f}"


def is_gone(name: str) -> bool:
    """Whether the process of this name has ended; of another host's process nothing is known, and it counts as alive."""
    host, _, rest = name.partition(" ")
    if host != socket.gethostname():
        return False
    pid = rest.split(" ")[1] if rest.count(" ") == 2 else ""
    try:
        return process_name(psutil.Process(int(pid))) != name
    except (ValueError, psutil.Error):
        return True


def boot_id() -> str:
    """What changes with each start of the machine."""
    linux = Path("/proc/sys/kernel/random/boot_id")
    return linux.read_text().strip() if linux.is_file() else f"{psutil.boot_time():.0f}"
