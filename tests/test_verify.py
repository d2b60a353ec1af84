"""tools/verify.py: what it says of artifacts that came out equal, otherwise, or not at all."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from stages.outputs import hash_of, md5
from tests.pipeline import clone_working_tree, commit, environment, run
from tools import verify
from tools.clone import ROOT, clone, git
from tools.difference import difference
from tools.table import table
from tools.verify import Artifact, CannotVerifyError, check_dataset, committed_content, compare, read_lock, summary

HERE = {"cpu": "AVX512", "torch": "2"}


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

    def judged(path, old, new, *, known=True):
        artifact = Artifact("train", path, md5(old))
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if new is not None:
            (tmp_path / path).write_bytes(new)
        (tmp_path / "dvc.lock").write_bytes(lock_of([artifact]))
        [(stage, compared, result)] = compare([artifact], tmp_path, lambda _: old if known else None)
        assert (stage, compared) == ("train", path)
        return result

    return judged


# The verdict on an artifact


def test_compare_finds_equal_bytes_equal(judged):
    assert judged("models/vae.safetensors", b"weights", b"weights") == "equal"


def test_compare_finds_an_artifact_missing_that_was_not_made(judged):
    assert judged("plots/grid.png", b"picture", None).startswith("missing: was not made")


def test_compare_says_by_how_much_a_file_differs(judged):
    assert judged("metrics/report.md", b"a b", b"a") == "differs: 3 → 1 bytes"


def test_compare_takes_a_folder_as_dvc_does(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.npy").write_bytes(b"images")
    artifact = Artifact("download", "data", hash_of(tmp_path / "data"))
    (tmp_path / "dvc.lock").write_bytes(lock_of([artifact]))
    assert compare([artifact], tmp_path, lambda _: None) == [["download", "data", "equal"]]

    (tmp_path / "data/x.npy").write_bytes(b"other images")
    [[*_, result]] = compare([artifact], tmp_path, lambda _: None)
    assert result == "differs: other files are in the folder"

    shutil.rmtree(tmp_path / "data")
    [[*_, result]] = compare([artifact], tmp_path, lambda _: None)
    assert result.startswith("missing: was not made")


def test_compare_says_where_the_old_content_is_unknown(judged):
    assert judged("models/vae.safetensors", b"old", b"new", known=False) == (
        "differs: the old file is neither in git nor in the cache"
    )


def test_compare_names_an_artifact_that_only_the_new_run_has(tmp_path):
    old, new = Artifact("train", "a.csv", md5(b"a")), Artifact("evaluate", "b.csv", md5(b"b"))
    (tmp_path / "a.csv").write_bytes(b"a")
    (tmp_path / "b.csv").write_bytes(b"b")
    (tmp_path / "dvc.lock").write_bytes(lock_of([old, new]))
    results = [(path, result) for _, path, result in compare([old], tmp_path, lambda _: None)]
    assert results == [("a.csv", "equal"), ("b.csv", "differs: is not in the committed dvc.lock")]


def test_committed_content_is_what_git_has_where_the_lock_names_it(tmp_path, monkeypatch):
    (tmp_path / "losses.csv").write_bytes(b"committed")
    run(tmp_path, "git", "init", "--quiet")
    for name, value in {"user.name": "A Tester", "user.email": "tester@example.org"}.items():
        run(tmp_path, "git", "config", name, value)
    run(tmp_path, "dvc", "init", "--quiet")
    commit(tmp_path, "A run")
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    assert committed_content(Artifact("train", "losses.csv", md5(b"committed"))) == b"committed"
    assert committed_content(Artifact("train", "losses.csv", md5(b"of another run"))) is None


def test_md5_is_that_of_dvc(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"line one\r\nline two\n\0")
    run(tmp_path, "dvc", "init", "--no-scm", "--quiet")
    run(tmp_path, "dvc", "stage", "add", "--quiet", "--name", "copy", "--outs", "copy.bin", "cp data.bin copy.bin")
    run(tmp_path, "dvc", "repro", "--quiet")
    [artifact] = read_lock((tmp_path / "dvc.lock").read_bytes())
    assert artifact == Artifact("copy", "copy.bin", md5((tmp_path / "data.bin").read_bytes()))


# By how much two files differ


def as_json(**entries):
    return json.dumps(entries).encode()


def png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "png", **options)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def weights(**arrays):
    return safetensors.numpy.save({name: np.asarray(array, np.float32) for name, array in arrays.items()})


PIXELS = np.arange(200).reshape(10, 20)
MARKED = PIXELS.copy()
MARKED[0, :3] += [1, 2, 7]


@pytest.mark.parametrize(
    ("suffix", "old", "new", "expected"),
    [
        (
            ".json",
            as_json(epochs=10, train_bce=150.0, train_loss=154.75),
            as_json(epochs=10, train_bce=150.1, train_loss=154.0),
            "2 of 3 values, most in train_loss (by 0.75)",
        ),
        (".json", as_json(nll=1, nll_method="a"), as_json(nll=2, nll_method="b"), "2 of 2 values, most in nll_method"),
        (".json", as_json(sizes={"x": 1}, nll=1), as_json(sizes={"x": 2}, nll=1), "1 of 2 values, most in sizes"),
        (".csv", b"digit,z0\n3,0.5\n4,0.5\n", b"digit,z0\n3,0.5\n4,0.75\n", "1 of 4 values, most in z0 (by 0.25)"),
        (".csv", b"a,binarize\n1,none\n", b"a,binarize\n1,static\n", "1 of 2 values, most in binarize"),
        (".png", png(PIXELS), png(MARKED), "3 of 200 values, most in pixels (by 7)"),
        (
            ".safetensors",
            weights(a=[1, 1], b=[0, 0, 0]),
            weights(a=[1, 1.25], b=[0, 0, 0]),
            "1 of 5 values, most in a (by 0.25)",
        ),
        (
            ".npz",  # whose uint8 arithmetic would wrap around to 1
            npz(x_train=np.array([0, 255], np.uint8)),
            npz(x_train=np.array([255, 255], np.uint8)),
            "1 of 2 values, most in x_train (by 2.6e+02)",
        ),
        (".html", b"a\nb\n", b"a\n", "4 → 2 bytes"),
        (".png", b"no picture", b"nor this", "10 → 8 bytes"),
        (".safetensors", b"no weights", b"nor this", "10 → 8 bytes"),
    ],
)
def test_difference_tells_how_many_values_and_how_far(suffix, old, new, expected):
    assert difference(suffix, old, new) == expected


@pytest.mark.parametrize(
    ("suffix", "old", "new"),
    [
        (".json", as_json(loss=1.0), as_json(loss=1.0, nll=2.0)),
        (".csv", b"epoch\n1\n2\n", b"epoch\n1\n"),
        (".png", png(PIXELS), png(PIXELS.T)),
        (".safetensors", weights(a=[1]), weights(b=[1])),
    ],
)
def test_difference_tells_values_of_another_shape(suffix, old, new):
    assert difference(suffix, old, new) == f"{len(old)} → {len(new)} bytes, with values of other names or number"


def test_difference_tells_equal_pixels_in_other_bytes():
    old, new = png(PIXELS), png(PIXELS, compress_level=0)
    assert difference(".png", old, new) == f"{len(old)} → {len(new)} bytes, with equal values"


# What is printed


def test_table_is_aligned_and_is_markdown():
    assert table(["stage", "s"], [["train", "25.35"], ["all", "4"]], numbers=True).splitlines() == [
        "| stage |     s |",
        "| :---- | ----: |",
        "| train | 25.35 |",
        "| all   |     4 |",
    ]


def test_summary_counts_what_is_reproduced():
    assert summary(["equal", "equal"], HERE, HERE) == "The committed run is reproduced: 2 equal."


def test_summary_names_what_differs_in_the_environment():
    text = summary(["equal", "differs: 1 → 2 bytes"], HERE, {**HERE, "cpu": "AVX2"})
    assert text.startswith("1 equal, 1 differs.")
    assert "Other than in the committed run: cpu." in text
    assert "| cpu   | AVX512        | AVX2 |" in text


def test_summary_takes_an_equal_environment_for_no_reason():
    assert "so the environment is not the reason" in summary(["differs: 1 → 2 bytes"], HERE, HERE)


def test_summary_says_where_no_environment_was_recorded():
    text = summary(["missing: was not made"], {}, HERE)
    assert "| cpu   | not recorded  | AVX512 |" in text
    assert "Other than in the committed run: cpu, torch." in text


# Nothing to compare


@pytest.mark.parametrize("lock", [b"", b"stages: [", b"stages:\n  train:\n    cmd: x\n", b"schema: '2.0'\n", b"\xff"])
def test_read_lock_refuses_a_damaged_lock_in_one_line(lock):
    with pytest.raises(CannotVerifyError, match=r"dvc\.lock .* `dvc repro`"):
        read_lock(lock)


def test_check_dataset_refuses_another_data_set():
    check_dataset("digits", "digits")
    with pytest.raises(CannotVerifyError, match=r"nothing to compare: .* mnist, this one on digits; .* MNIST_MIRROR"):
        check_dataset("digits", "mnist")


def test_verify_outside_of_git_is_one_line(tmp_path):
    for name in ("stages", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    done = run_verify(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("verify: git rev-parse: fatal: not a git repository")
    assert len(done.stderr.splitlines()) == 1


# What it runs in


def test_environment_names_no_other_workspace(monkeypatch, tmp_path):
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI", "GIT_DIR"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("MNIST_MIRROR", "../mnist")
    env = environment(tmp_path, EXTRA="1")
    assert "elsewhere" not in env.values()
    assert env["MNIST_MIRROR"] == str(ROOT / "../mnist")
    assert env["PATH"].startswith(str(Path(sys.executable).parent))
    assert env["EXTRA"] == "1"


def test_environment_leaves_an_address_of_mnist_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MNIST_MIRROR", "https://example.org/mnist")
    assert environment(tmp_path)["MNIST_MIRROR"] == "https://example.org/mnist"


def test_clone_has_the_files_of_the_commit_and_no_way_back(tmp_path):
    folder = clone(tmp_path / "clone")
    assert git("rev-parse", "HEAD", folder=folder) == git("rev-parse", "HEAD")
    assert git("status", "--porcelain", folder=folder) == ""
    assert git("remote", folder=folder) == ""


def test_clone_has_the_files_of_the_working_tree_where_asked(tmp_path):
    folder = clone(tmp_path / "clone", uncommitted=True)
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    expected = {name: (ROOT / name).read_bytes() for name in listed if (ROOT / name).is_file()}
    found = {path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts}
    assert {str(path.relative_to(folder)): path.read_bytes() for path in found} == expected


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
def test_verify_reproduces_every_artifact_but_a_changed_picture(pipeline, tmp_path):
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
    lines = done.stdout.partition("\n\n")[0].splitlines()[2:]
    results = {path: result for _, path, result in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert results.keys() == {artifact.path for artifact in read_lock(lock.read_bytes())}
    assert results.pop("plots/grid.png").startswith("differs: ")
    assert set(results.values()) == {"equal"}, done.stdout
    assert "so the environment is not the reason" in done.stdout
    assert "verifying HEAD, not your uncommitted changes" in done.stderr
    assert not list(folder.glob("mnist-vae-verify-*"))
    assert run(pipeline, "git", "status", "--porcelain").stdout.split() == ["M", "params.yaml"]


@pytest.mark.slow
def test_verify_compares_nothing_where_mnist_is_out_of_reach(tmp_path):
    folder = clone_working_tree(tmp_path / "clone")
    assert json.loads((folder / "metrics/train.json").read_text())["dataset"] == "mnist"
    nobody = "http://127.0.0.1:9"  # the discard port: connections are refused
    done = run_verify(folder, MNIST_MIRROR=nobody, http_proxy=nobody, https_proxy=nobody, no_proxy="")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("verify: nothing to compare: the committed run was made on mnist")
    assert "Running stage 'train'" not in done.stderr
