"""What libraries are told before they are loaded, so that a result does not depend on the processor."""

import os

import pytest

from mnist_vae import portable
from mnist_vae.portable import SETTINGS, is_portable, set_up_libraries


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    """An environment without them, on a processor that has what they need."""
    monkeypatch.setattr(portable, "is_able", lambda: True)
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in SETTINGS})


def test_a_process_is_portable_when_all_is_set():
    assert not is_portable()
    set_up_libraries()

    assert is_portable()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_environment_says_stands_and_is_no_longer_portable(name):
    os.environ[name] = "another"
    set_up_libraries()

    assert os.environ[name] == "another"
    assert not is_portable()


def test_nothing_is_set_where_the_processor_cannot(monkeypatch):
    monkeypatch.setattr(portable, "is_able", lambda: False)
    set_up_libraries()

    assert not SETTINGS.keys() & os.environ.keys()
    assert not is_portable()
