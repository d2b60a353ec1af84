"""What is asked for is checked before any test is collected, where pytest says so in one line."""

import os

import pytest


def pytest_configure() -> None:
    count = os.environ.get("FAULTS")
    if count and not count.isdecimal():
        raise pytest.UsageError(f"FAULTS is {count!r}; it must be a whole number: how many faults to inject")
