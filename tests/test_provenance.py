"""Which code made a result, in small git repositories."""

import subprocess

import pytest

from mnist_vae.tracking.provenance import git_state

UNKNOWN = {"git_commit": "unknown", "git_dirty": "unknown"}


@pytest.fixture(autouse=True)
def _git_of_its_own(tmp_path, monkeypatch):
    """No repository around the temporary folder, no settings of the person who runs the tests."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set while a hook runs
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")


@pytest.fixture
def repository(tmp_path):
    """One commit with code and what the pipeline writes."""
    folder = tmp_path / "repository"
    for name in ("train.py", "dvc.lock", "metrics/train.json", "plots/grid.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_git_state_names_a_clean_checkout_by_its_commit(repository):
    head = (repository / ".git" / "refs" / "heads").glob("*")

    assert git_state(repository) == {"git_commit": next(head).read_text().strip(), "git_dirty": "false"}


def test_git_state_is_dirty_with_a_changed_file(repository):
    (repository / "train.py").write_text("second\n")

    assert git_state(repository)["git_dirty"] == "true"


def test_git_state_is_dirty_with_a_new_file(repository):
    (repository / "new.py").touch()

    assert git_state(repository)["git_dirty"] == "true"


@pytest.mark.parametrize("output", ["metrics/train.json", "metrics/new.json", "plots/grid.png", "dvc.lock"])
def test_git_state_stays_clean_whatever_the_pipeline_writes(repository, output):
    (repository / output).write_text("second\n")

    assert git_state(repository)["git_dirty"] == "false"


def test_git_state_of_a_folder_is_clean_where_only_a_file_beside_it_changed(repository):
    (repository / "plots/grid.png").write_text("second\n")

    assert git_state(repository / "metrics")["git_dirty"] == "false"


def test_git_state_is_unknown_outside_of_git(tmp_path):
    assert git_state(tmp_path) == UNKNOWN


def test_git_state_is_unknown_before_the_first_commit(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)

    assert git_state(tmp_path) == UNKNOWN


def test_git_state_is_unknown_without_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")

    assert git_state(repository) == UNKNOWN
