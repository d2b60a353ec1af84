"""What keeps DVC from running is answered with a remedy in words."""

import json
import subprocess
import sys

import pytest

from tools.remedies import remedies


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A git repository with a good dvc.lock and a good rwlock."""
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set while a hook runs
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    subprocess.run(["git", "init", "--quiet"], check=True)
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  download: {}\n")
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/rwlock").write_text("{}")
    return tmp_path


def test_remedies_says_nothing_where_nothing_is_wrong(folder):
    assert list(remedies()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0\0"])
def test_remedies_has_a_damaged_rwlock_removed(folder, content):
    (folder / ".dvc/tmp/rwlock").write_text(content)

    (remedy,) = remedies()

    assert "is damaged: remove it (`rm .dvc/tmp/rwlock`)" in remedy


def test_remedies_names_the_processes_in_an_rwlock(folder):
    holders = {"/a": {"write": {"pid": 123, "cmd": "dvc repro"}}, "/b": {"read": [{"pid": 456}, {"pid": 123}]}}
    (folder / ".dvc/tmp/rwlock").write_text(json.dumps(holders))

    (remedy,) = remedies()

    assert "names the processes 123, 456; if none of them is a dvc any more, remove it" in remedy


@pytest.mark.parametrize("content", [b"", b"stages:\n  train:\n    cmd: [", b"\xff\xfe", b"schema: '2.0'\nstages: 3\n"])
def test_remedies_has_a_damaged_lock_brought_back_from_git(folder, content):
    (folder / "dvc.lock").write_bytes(content)

    (remedy,) = remedies()

    assert remedy.startswith("dvc.lock is damaged: `git checkout -- dvc.lock`")


def test_remedies_names_a_missing_git(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))

    assert list(remedies()) == ["git is not installed, and DVC needs it"]


def test_remedies_names_an_environment_that_was_moved(folder):
    script = folder / ".venv/bin/dvc"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!{sys.executable}\n")
    assert list(remedies()) == []

    script.write_text("#!/where/it/was/.venv/bin/python\n")
    (remedy,) = remedies()

    assert remedy.startswith("this folder was moved, and .venv with it: `make clean setup`")


def test_remedies_names_a_missing_repository(folder):
    subprocess.run(["rm", "-r", ".git"], check=True)

    (remedy,) = remedies()

    assert "is no git repository" in remedy
    assert "git init" in remedy
