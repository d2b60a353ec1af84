"""Every fault of the table, injected for real; FAULTS=12 takes a seeded sample of 12 (FAULTS_SEED names the seed)."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock

pytest.register_assert_rewrite("tests.faults")

from tests.faults import lab as laboratory  # noqa: E402  after the rewrite of its assertions
from tests.faults.__main__ import DOCUMENT, document  # noqa: E402
from tests.faults.oracle import assert_whole  # noqa: E402
from tests.faults.table import FAULTS, Fault  # noqa: E402

SEED = os.environ.get("FAULTS_SEED") or f"{datetime.now(UTC):%Y%m%d}"  # another sample each day, one for all workers


def sample() -> list[Fault]:
    """The faults to inject."""
    count = os.environ.get("FAULTS")
    return random.Random(SEED).sample(FAULTS, min(int(count), len(FAULTS))) if count else FAULTS


def slug(fault: Fault) -> str:
    return re.sub(r"\W+", "-", fault.name).strip("-").lower()


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run, made once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "faults.lock"):
        if not (folder / "faults/finished").exists():
            laboratory.make_states(folder / "faults")
    return folder / "faults"


@pytest.fixture
def lab(states: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[laboratory.Lab]:
    print(f"FAULTS_SEED={SEED}")
    with ExitStack() as stack:
        yield laboratory.Lab(states, tmp_path, f"{SEED} {request.node.name}", stack)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("fault", sample(), ids=slug)
def test_one_dvc_repro_makes_everything_whole_after(fault: Fault, lab: laboratory.Lab) -> None:
    judge(fault, lab)


def judge(fault: Fault, lab: laboratory.Lab) -> None:
    """Inject the fault; then one plain `dvc repro` has to make everything whole."""
    fault.run(lab)
    lab.repro().says(*lab.next_says)
    assert_whole(lab)


def test_the_document_is_what_the_table_says():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "`python -m tests.faults` writes it"


def test_names_of_faults_are_unique():
    slugs = [slug(fault) for fault in FAULTS]
    assert len(set(slugs)) == len(slugs) >= 55


@pytest.mark.parametrize("count", ["abc", "-3"])
def test_a_sample_of_no_number_is_refused_in_one_line(count):
    command = [sys.executable, "-m", "pytest", "--collect-only", Path(__file__).parent]
    refused = subprocess.run(
        command, env=os.environ | {"FAULTS": count}, capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert refused.stderr.strip() == f"ERROR: FAULTS is '{count}'; it must be a whole number: how many faults to inject"
