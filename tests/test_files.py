"""Files appear whole or not at all."""

import json

import pytest

from mnist_vae.files import atomic_write, write_json


def test_what_was_written_takes_the_files_place(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"

    for content in ("first", "second"):
        with atomic_write(path) as scratch:
            scratch.write_text(content)
        assert path.read_text() == content

    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_the_scratch_file_has_the_same_name_on_the_same_disk(tmp_path):
    with atomic_write(tmp_path / "vae.pt") as scratch:
        assert scratch.name == "vae.pt"
        assert tmp_path in scratch.parents
        scratch.touch()


def test_the_old_file_stays_while_the_new_one_is_written(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    with atomic_write(path) as scratch:
        scratch.write_text("half")
        assert path.read_text() == "old"


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, problem):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with atomic_write(path) as scratch:
            scratch.write_text("half")
            raise problem

    with pytest.raises(problem):
        fail()

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_readable_by_people_and_programs(tmp_path):
    path = tmp_path / "metrics" / "train.json"
    write_json(path, {"loss": 154.06, "dataset": "Ziffern, größer"})

    assert path.read_text(encoding="utf-8") == '{\n  "loss": 154.06,\n  "dataset": "Ziffern, größer"\n}\n'
    assert json.loads(path.read_text(encoding="utf-8"))["loss"] == 154.06


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_is_no_json_number(tmp_path, value):
    path = tmp_path / "train.json"
    write_json(path, {"loss": 1.0})

    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": value})

    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert list(tmp_path.iterdir()) == [path]
