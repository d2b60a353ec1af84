"""tools/verify.py: what it says of artifacts that came out equal, otherwise, or not at all."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pipeline import clone_working_tree, commit, environment, run
from tools import verify
from tools.verify import CIRCUMSTANCES, Artifact, CannotVerifyError, Comparison, compare, md5, read_lock, row, summary

HERE = {"dataset": "digits", **dict.fromkeys(CIRCUMSTANCES, "as ever")}


def lock_of(artifacts):
    """A dvc.lock with these artifacts, as DVC writes it."""
    lines = ["schema: '2.0'", "stages:"]
    for stage, path, digest in artifacts:
        lines += [f"  {stage}:", "    cmd: python", "    outs:"]
        lines += [f"    - path: {path}", "      hash: md5", f"      md5: {digest}", "      size: 1"]
    return "\n".join(lines).encode()


@pytest.fixture
def judged(tmp_path):
    """What ``compare`` says of one artifact: its path, the committed bytes, the new ones (None: not made)."""

    def judged(path, old, new, *, known=True, commits=()):
        artifact = Artifact("train", path, md5(old))
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if new is not None:
            (tmp_path / path).write_bytes(new)
        (tmp_path / "dvc.lock").write_bytes(lock_of([artifact]))
        [comparison] = compare([artifact], tmp_path, lambda _: old if known else None, commits)
        return comparison.result, comparison.note

    return judged


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def as_json(**entries):
    return json.dumps(entries).encode()


def report(commit_name, loss):
    return f"| data | `MNIST` |\n| code, git commit | `{commit_name}` |\n| torch | `2` |\n\nloss {loss}\n".encode()


# Equal and missing


def test_equal_bytes_are_equal(judged):
    assert judged("models/vae.pt", b"weights", b"weights") == ("equal", "")


def test_an_artifact_that_was_not_made_is_missing(judged):
    result, note = judged("plots/grid.png", b"picture", None)
    assert result == "missing"
    assert "was not made" in note


def test_an_artifact_that_only_the_new_run_has_is_told(tmp_path):
    old, new = Artifact("train", "a.csv", md5(b"a")), Artifact("evaluate", "b.csv", md5(b"b"))
    (tmp_path / "a.csv").write_bytes(b"a")
    (tmp_path / "b.csv").write_bytes(b"b")
    (tmp_path / "dvc.lock").write_bytes(lock_of([old, new]))
    results = [(one.artifact.path, one.result) for one in compare([old], tmp_path, lambda _: None, [])]
    assert results == [("a.csv", "equal"), ("b.csv", "differs")]


def test_md5_is_that_of_dvc(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"line one\r\nline two\n\0")
    run(tmp_path, "dvc", "init", "--no-scm", "--quiet")
    run(tmp_path, "dvc", "stage", "add", "--quiet", "--name", "copy", "--outs", "copy.bin", "cp data.bin copy.bin")
    run(tmp_path, "dvc", "repro", "--quiet")
    [artifact] = read_lock((tmp_path / "dvc.lock").read_bytes())
    assert artifact == Artifact("copy", "copy.bin", md5((tmp_path / "data.bin").read_bytes()))


# Different, and by how much


def test_metrics_differ_with_the_old_and_the_new_loss(judged):
    old, new = (
        as_json(epochs=10, train_bce=150.0, train_loss=154.8224),
        as_json(epochs=10, train_bce=150.1, train_loss=154.8),
    )
    assert judged("metrics/train.json", old, new) == (
        "differs",
        "train_loss 154.8224 → 154.8000 (-0.02), and 1 more of 3 entries",
    )


def test_a_metric_that_came_or_went_differs(judged):
    note = judged("metrics/evaluate.json", as_json(loss=1.0), as_json(loss=1.0, nll=2.0))[1]
    assert note == "nll None → 2.0"


def test_a_table_differs_by_its_largest_difference(judged):
    note = judged(
        "plots/latents.csv", b"digit,z0,z1\n3,0.5,1.0\n4,0.5,-1.0\n", b"digit,z0,z1\n3,0.5,1.0\n4,0.6,-0.5\n"
    )[1]
    assert note == "by at most 0.5 (in z1)"


def test_a_table_of_another_size_differs_by_its_size(judged):
    note = judged("plots/losses.csv", b"epoch\n1\n2\n", b"epoch\n1\n")[1]
    assert note == "2 rows of epoch → 1 rows of epoch"


def test_a_table_with_other_words_names_their_column(judged):
    assert judged("plots/losses.csv", b"a,kind\n1,none\n", b"a,kind\n1,static\n")[1] == "other entries in kind"


def test_a_picture_differs_by_its_share_of_pixels(judged):
    old, new = np.zeros((10, 20)), np.zeros((10, 20))
    new[0, :3] = [1, 2, 7]
    assert judged("plots/grid.png", png(old), png(new))[1] == "in 1.50% of the pixels, by at most 7 of 255"


def test_a_picture_with_the_same_pixels_is_told_from_another(judged):
    other_bytes = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(other_bytes, "png", compress_level=0)
    note = judged("plots/grid.png", png(np.zeros((2, 2))), other_bytes.getvalue())[1]
    assert note == "the same pixels, written in other bytes"


def test_a_picture_of_another_size_differs_by_its_size(judged):
    assert judged("plots/grid.png", png(np.zeros((2, 3))), png(np.zeros((4, 5))))[1] == "3 × 2 → 5 × 4 pixels"


def test_weights_differ_by_their_largest_difference(judged):
    old, new = io.BytesIO(), io.BytesIO()
    torch.save({"weights": {"a": torch.ones(2), "b": torch.zeros(3)}, "dataset": "MNIST"}, old)
    torch.save({"weights": {"a": torch.tensor([1.0, 1.25]), "b": torch.zeros(3)}, "dataset": "MNIST"}, new)
    assert judged("models/vae.pt", old.getvalue(), new.getvalue())[1] == "by at most 0.25 (in weights.a)"


def test_images_differ_by_their_largest_difference(judged):
    old, new = io.BytesIO(), io.BytesIO()
    np.savez(old, x_train=np.array([0, 255], np.uint8))
    np.savez(new, x_train=np.array([255, 255], np.uint8))  # uint8 arithmetic would wrap to 1
    assert judged("data/dataset.npz", old.getvalue(), new.getvalue())[1] == "by at most 2.6e+02 (in x_train)"


def test_text_differs_by_its_lines(judged):
    assert judged("plots/explorer.html", b"a\nb\nc\n", b"a\nB\nc\nd\n")[1] == "in 2 of 4 lines"


def test_a_file_that_is_not_of_its_kind_differs_by_its_bytes(judged):
    assert judged("plots/grid.png", b"no picture", b"nor this") == ("differs", "10 → 8 bytes")


def test_an_unknown_old_content_is_told(judged):
    result, note = judged("models/vae.pt", b"old", b"new", known=False)
    assert result == "differs"
    assert "not known" in note


# Expected to differ


def test_another_run_id_is_expected(judged):
    assert judged("models/run_id", b"1\n", b"2\n") == ("expected", "a new MLflow run each time")


@pytest.mark.parametrize(
    ("known", "commits"), [(True, []), (False, [b"cccc", b"aaaa with changes"])], ids=["cache", "history"]
)
def test_a_report_of_another_commit_is_expected(judged, known, commits):
    old, new = report("aaaa with changes", 154.8), report("bbbb", 154.8)
    result, note = judged("metrics/report.md", old, new, known=known, commits=commits)
    assert (result, note) == ("expected", "names another commit, and is equal in all else")


def test_a_report_of_other_numbers_differs(judged):
    result, note = judged("metrics/report.md", report("aaaa", 154.8), report("bbbb", 154.9))
    assert (result, note) == ("differs", "in 2 of 5 lines")


def test_a_report_whose_old_text_is_unknown_says_so(judged):
    result, note = judged("metrics/report.md", report("aaaa", 1), report("bbbb", 1), known=False, commits=[b"cccc"])
    assert result == "expected"
    assert "not in the DVC cache" in note


# What is printed


def comparison(result, note=""):
    return Comparison(Artifact("train", "models/vae.pt", "0" * 32), result, note)


def test_a_row_names_stage_artifact_and_result():
    assert row(comparison("equal")) == ("train", "models/vae.pt", "equal")
    assert row(comparison("expected", "a new run")) == ("train", "models/vae.pt", "expected to differ: a new run")


def test_a_reproduced_run_is_said_to_be_one():
    text = summary([comparison("equal"), comparison("equal"), comparison("expected")], HERE, HERE)
    assert text == "The committed run is reproduced: 2 equal, 1 different as expected."


def test_another_cpu_is_named_as_the_likely_reason():
    text = summary([comparison("differs")], HERE, {**HERE, "cpu": "AVX2"})
    assert "1 different" in text
    assert "another cpu:" in text
    [line] = [line for line in text.splitlines() if line.startswith("cpu")]
    assert line.split("  ")[-1] == "AVX2"


def test_equal_circumstances_are_no_reason():
    assert "the reason is another" in summary([comparison("differs")], HERE, HERE)


def test_circumstances_that_were_not_recorded_are_no_reason_either():
    text = summary([comparison("missing")], {"dataset": "digits"}, HERE)
    assert "does not record all circumstances" in text
    assert "not recorded" in text


@pytest.mark.parametrize("lock", [b"", b"stages: [", b"stages:\n  train:\n    cmd: x\n", b"schema: '2.0'\n"])
def test_a_damaged_lock_is_one_line(lock):
    with pytest.raises(CannotVerifyError, match=r"dvc\.lock .* `dvc repro`"):
        read_lock(lock)


def test_a_fallback_to_the_digits_is_nothing_to_compare():
    with pytest.raises(
        CannotVerifyError, match=r"nothing to compare: .* mnist, this one on digits, because mnist is out"
    ):
        verify.check_dataset({"name": "digits", "asked_for": "mnist"}, "mnist")
    verify.check_dataset({"name": "digits", "asked_for": "mnist"}, "digits")


def test_parameters_for_other_data_are_nothing_to_compare_either():
    with pytest.raises(CannotVerifyError, match=r"nothing to compare: .* mnist, this one on digits$"):
        verify.check_dataset({"name": "digits", "asked_for": "digits"}, "mnist")


def test_a_folder_without_git_is_one_line(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(verify.__file__, tmp_path / "tools")
    done = run_verify(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("verify: git rev-parse: not a git repository")
    assert len(done.stderr.splitlines()) == 1


# The whole of it


def run_verify(folder, **env):
    return subprocess.run(
        [sys.executable, "-m", "tools.verify"],
        cwd=folder,
        env=environment(folder, **env),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_a_committed_run_is_reproduced_but_for_a_picture_of_another(pipeline, tmp_path):
    # As if the committed picture had been drawn with something else.
    grid = pipeline / "plots" / "grid.png"
    pixels = np.asarray(Image.open(grid)).copy()
    pixels[0] = 0
    grid.write_bytes(png(pixels))
    lock = pipeline / "dvc.lock"
    [drawn] = [one for one in read_lock(lock.read_bytes()) if one.path == "plots/grid.png"]
    lock.write_text(lock.read_text().replace(drawn.md5, md5(grid.read_bytes())))
    run(pipeline, sys.executable, "-m", "tools.verify", "--record")
    commit(pipeline, "A run, and a picture of another")
    with (pipeline / "params.yaml").open("a") as params:
        params.write("# a change\n")
    folder = tmp_path / "temporary"
    folder.mkdir()

    done = run_verify(pipeline, TMPDIR=str(folder))

    assert done.returncode == 1, done.stderr
    rows = [line.split(maxsplit=2) for line in done.stdout.partition("\n\n")[0].splitlines()[1:]]
    results = {path: result for _, path, result in rows}
    assert results.pop("plots/grid.png").startswith("differs: in ")
    assert results.pop("models/run_id").startswith("expected to differ")
    assert results.pop("metrics/report.md") == "expected to differ: names another commit, and is equal in all else"
    assert len(results) >= 14
    assert set(results.values()) == {"equal"}
    assert "The circumstances are those of the committed run" in done.stdout
    assert "verifying HEAD, not your uncommitted changes" in done.stderr
    assert not list(folder.glob("mnist-vae-verify-*"))
    assert run(pipeline, "git", "status", "--porcelain").stdout.split() == ["M", "params.yaml"]


@pytest.mark.slow
def test_without_mnist_there_is_nothing_to_compare(tmp_path):
    clone = clone_working_tree(tmp_path / "clone")
    assert json.loads((clone / "metrics/train.json").read_text())["dataset"] == "mnist"
    nobody = "http://127.0.0.1:9"  # the discard port: connections are refused
    done = run_verify(clone, MNIST_MIRROR=nobody, http_proxy=nobody, https_proxy=nobody, no_proxy="")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("verify: nothing to compare: the committed run was made on mnist")
    assert "Running stage 'train'" not in done.stderr
