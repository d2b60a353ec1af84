"""Every fault of the table, injected for real."""

import os
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock

from tests.faults.lab import Lab, make_states
from tests.faults.oracle import assert_whole
from tests.faults.table import FAULTS, Fault

SEED = os.environ.get("FAULTS_SEED") or f"{datetime.now(UTC):%Y%m%d}"  # a new sample every day, equal for all workers


def judge(fault: Fault, lab: Lab) -> None:
    """Inject the fault; then one plain `dvc repro` has to make everything whole."""
    fault.run(lab)
    said = lab.repro()
    said.says(*lab.next_says)
    assert_whole(lab)
