"""From what was measured to text: a table per question, and for each limit whether it holds."""

import datetime
import importlib.metadata
import os
import platform
from dataclasses import dataclass, field

from tools.clone import GitError, git
from tools.machine import processor
from tools.table import table

VERSIONS = ("torch", "lightning", "mlflow", "dvc", "numpy")


@dataclass(frozen=True)
class Limit:
    """A measured value next to what it may be."""

    what: str
    value: float
    limit: float
    unit: str = "×"
    at_least: bool = False  # the limit is a floor

    @property
    def holds(self) -> bool:
        """A value that is no number holds nowhere."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def row(self) -> list[str]:
        """What, measured, limit, verdict."""
        bound = "at least" if self.at_least else "at most"
        verdict = "holds" if self.holds else "**does not hold**"
        measured = f"{self.value:#.3g}".removesuffix(".")
        return [self.what, f"{measured} {self.unit}", f"{bound} {self.limit:.3g} {self.unit}", verdict]


@dataclass
class Section:
    """One question's answer."""

    title: str
    about: str  # how it was measured
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    closing: str = ""
    failure: str = ""  # what went wrong, where there is no answer


def render(sections: list[Section], machine: list[str]) -> str:
    """The whole of results.md."""
    limits = [[section.title, *limit.row()] for section in sections for limit in section.limits]
    limits += [
        [section.title, "could not be measured", "", "", "**does not hold**"] for section in sections if section.failure
    ]
    parts = [
        "# Benchmarks",
        "Made by `python -m benchmarks`; do not edit. Seconds are medians over the rounds, with their spread "
        "(min–max). In every round the contenders take turns, each in a process of its own.",
        "\n".join(f"- {line}" for line in machine),
        "## Do the limits hold?",
        table(["question", "what", "measured", "limit", ""], limits, numbers=True),
    ]
    for section in sections:
        parts += [f"## {section.title}", section.about]
        if section.failure:
            parts.append(f"This could not be measured:\n\n```\n{section.failure}\n```")
        if section.rows:
            parts.append(table(section.columns, section.rows, numbers=True))
        if section.limits:
            parts.append("\n".join("- {}: {} ({}): {}".format(*limit.row()) for limit in section.limits))
        if section.closing:
            parts.append(section.closing)
    return "\n\n".join(parts) + "\n"


def machine() -> list[str]:
    """Where and when this was measured, with what, of which code; call it before the measurements begin."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    return [
        f"Machine: {processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; {platform.system()} {platform.machine()}; "
        f"load before the start {os.getloadavg()[0]:.2f}",
        f"Versions: Python {platform.python_version()}, {packages}",
        f"Commit: {commit()}",
        f"Date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    ]


def commit() -> str:
    """The commit of the code that runs, and whether its files differ from it."""
    try:
        changes = "with" if git("status", "--porcelain") else "without"
        return f"{git('rev-parse', 'HEAD').strip()}, {changes} uncommitted changes"
    except GitError:
        return "unknown"
