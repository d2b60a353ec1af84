"""From what was measured to text: a table per question, and for each of the issue's limits whether it holds."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

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
        return [self.what, f"{self.value:.3g} {self.unit}", f"{bound} {self.limit:.3g} {self.unit}", verdict]


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
        "Made by `make bench`; do not edit. Seconds are medians over the rounds, with their spread (min–max). "
        "In every round the contenders take turns, each in a process of its own.",
        "\n".join(f"- {line}" for line in machine),
        "## Do the limits hold?",
        table(["question", "what", "measured", "limit", ""], limits),
    ]
    for section in sections:
        parts += [f"## {section.title}", section.about]
        if section.failure:
            parts.append(f"This could not be measured:\n\n```\n{section.failure}\n```")
        if section.rows:
            parts.append(table(section.columns, section.rows))
        if section.limits:
            parts.append("\n".join("- {}: {} ({}): {}".format(*limit.row()) for limit in section.limits))
        if section.closing:
            parts.append(section.closing)
    return "\n\n".join(parts) + "\n"


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    rule = [":--", *["--:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def machine(root: Path) -> list[str]:
    """Where and when this was measured, with what, of which code; call it before the measurements begin."""
    from mnist_vae.tracking.provenance import git_state

    git = git_state(root)
    state = {"true": ", with uncommitted changes", "false": ", without uncommitted changes"}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    return [
        f"Machine: {processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; {platform.system()} {platform.machine()}; "
        f"load before the start {os.getloadavg()[0]:.2f}",
        f"Versions: Python {platform.python_version()}, {packages}",
        f"Commit: {git['git_commit']}{state.get(git['git_dirty'], '')}",
        f"Date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    ]


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown processor"
