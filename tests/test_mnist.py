"""MNIST from folders, from servers on this machine, and from servers that fail in the ways that servers do."""

import contextlib
import gzip
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mnist_vae.errors import UserError
from mnist_vae.sources import fetch, mnist
from mnist_vae.sources.mnist import NoMirrorAnswersError, download_mnist
from tests import servers

FILES = [
    f"{name}-ubyte.gz" for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
]
OK = b"HTTP/1.0 200 OK\r\n"


@pytest.fixture(scope="module")
def torchvisions_mnist():
    mnist.torchvision_mnist()  # which makes torchvision importable
    from torchvision.datasets import MNIST

    return MNIST


@pytest.fixture(autouse=True)
def own_mirrors(monkeypatch, torchvisions_mnist):
    """torchvision's own mirrors; empty, so that no test reaches for the network. No test waits before it retries."""
    mirrors = []
    monkeypatch.setattr(torchvisions_mnist, "mirrors", mirrors)
    monkeypatch.setattr(fetch, "RETRY_WAITS_S", (0.0, 0.0))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return mirrors


@pytest.fixture
def serve():
    """``servers.serve`` until the test ends; gives the server."""
    with contextlib.ExitStack() as stack:
        yield lambda *answers: stack.enter_context(servers.serve(*answers))


@pytest.fixture
def nobody():
    """An address where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/"


def idx(array):
    """``array`` of unsigned bytes as the content of an IDX file."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def publish(tmp_path, monkeypatch, torchvisions_mnist):
    """Put four contents into a folder as .gz files, and have torchvision know them, whatever they are, for MNIST's."""

    def publish(contents):
        folder = tmp_path / "published"
        folder.mkdir(exist_ok=True)
        resources = []
        for name, content in zip(FILES, contents, strict=True):
            packed = gzip.compress(content)
            (folder / name).write_bytes(packed)
            resources.append((name, hashlib.md5(packed).hexdigest()))
        monkeypatch.setattr(torchvisions_mnist, "resources", resources)
        return folder

    return publish


@pytest.fixture
def small_arrays(monkeypatch):
    """Four arrays in place of MNIST's, with as many images as a quick test needs."""
    monkeypatch.setattr(mnist, "SHAPES", ((30, 28, 28), (30,), (10, 28, 28), (10,)))
    generator = np.random.default_rng(0)
    return [generator.integers(10, size=shape, dtype=np.uint8) for shape in mnist.SHAPES]


@pytest.fixture
def small(small_arrays, publish):
    """A folder with the four files of ``small_arrays``."""
    return publish([idx(array) for array in small_arrays])


def fails(mirror, match, error_class=UserError):
    """Assert that the download ends in exactly this class of error, and give its text."""
    with pytest.raises(UserError, match=match) as error:
        download_mnist(mirror)
    assert error.type is error_class
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_is_mnist(dataset):
    assert dataset.name == "mnist"
    assert dataset.x_train.shape == (60_000, 28, 28)
    assert dataset.x_test.shape == (10_000, 28, 28)
    assert dataset.x_train.mean() == pytest.approx(0.1307 * 255, rel=1e-3)  # known from everywhere
    assert dataset.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    arrays = [dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test]
    assert {array.dtype for array in arrays} == {np.dtype("uint8")}
    assert all(array.flags.writeable for array in arrays)  # torch warns of others


def test_sources_mnist_is_imported_without_torch():
    program = "import sys, mnist_vae.sources.mnist; sys.exit(bool({'torch', 'torchvision'} & set(sys.modules)))"
    source = Path(mnist.__file__).parents[2]

    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(source)}, check=True)


# the real files


def test_download_mnist_reads_a_folder(mnist_folder):
    assert_is_mnist(download_mnist(str(mnist_folder)))


def test_download_mnist_asks_a_server(mnist_folder, serve):
    assert_is_mnist(download_mnist(serve(servers.files(mnist_folder)).url))


def test_download_mnist_equals_torchvisions_own_reading(mnist_folder, tmp_path, torchvisions_mnist):
    shutil.copytree(mnist_folder, tmp_path / "MNIST" / "raw")
    for name in FILES:
        content = gzip.decompress((mnist_folder / name).read_bytes())
        (tmp_path / "MNIST" / "raw" / name.removesuffix(".gz")).write_bytes(content)
    dataset = download_mnist(str(mnist_folder))

    for split in ("train", "test"):
        expected = torchvisions_mnist(str(tmp_path), train=split == "train")
        np.testing.assert_array_equal(getattr(dataset, f"x_{split}"), expected.data.numpy())
        np.testing.assert_array_equal(getattr(dataset, f"y_{split}"), expected.targets.numpy())


# a folder


def test_download_mnist_names_a_folder_that_does_not_exist(tmp_path):
    fails(str(tmp_path / "nowhere"), r"MNIST_MIRROR: .*nowhere.* does not exist.*; point MNIST_MIRROR at")


@pytest.mark.parametrize("name", FILES)
def test_download_mnist_names_the_file_that_a_folder_lacks(small, own_mirrors, nobody, name):
    own_mirrors.append(nobody)
    (small / name).unlink()

    fails(str(small), rf"{name} does not exist")


def test_download_mnist_does_not_read_from_a_device(small):
    (small / FILES[1]).unlink()
    (small / FILES[1]).symlink_to("/dev/zero")

    fails(str(small), rf"{FILES[1]} .*is not a file")


@pytest.mark.parametrize("name", [FILES[1], FILES[2]])
def test_download_mnist_refuses_a_truncated_file_in_a_folder(small, name):
    (small / name).write_bytes((small / name).read_bytes()[:-10])

    fails(str(small), rf"{name} is not MNIST's")


def test_download_mnist_refuses_other_labels_in_mnists_format(small, small_arrays):
    (small / FILES[3]).write_bytes(gzip.compress(idx(9 - small_arrays[3])))

    fails(str(small), rf"{FILES[3]} is not MNIST's")


def test_download_mnist_names_a_file_that_cannot_be_read(small, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)

    fails(str(small), rf"{small}/{FILES[0]} cannot be read \(Permission denied\); point MNIST_MIRROR at")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"\0\0\x0d" + content[3:],  # floats
        lambda content: content[:7] + b"\x02" + content[8:],  # another count
        lambda content: content[:-1],
        lambda content: content + bytes(100_000_000),  # 0.1 MB as .gz
    ],
    ids=["magic", "count", "short", "bomb"],
)
def test_file_unpack_refuses_an_idx_file_of_another_type_or_size(small_arrays, publish, damage):
    contents = [idx(array) for array in small_arrays]
    contents[2] = damage(contents[2])

    fails(str(publish(contents)), rf"{FILES[2]} does not hold an array of shape \(10, 28, 28\)")


# disks


def test_download_mnist_needs_no_temporary_folder(small, serve, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))

    assert len(download_mnist(serve(servers.files(small)).url).x_train) == 30


def test_download_mnist_does_not_take_a_problem_of_this_machine_for_silence(nobody, monkeypatch, tmp_path):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))

    fails(
        nobody.replace("http:", "https:"),
        rf"MNIST cannot be downloaded: .*{tmp_path}/missing.pem; correct this machine's set-up",
    )


# which mirror


@pytest.mark.parametrize("end", ["", "/"])
def test_download_mnist_asks_the_chosen_mirror_first(small, small_arrays, serve, own_mirrors, end):
    own = serve(servers.files(small))
    own_mirrors.append(own.url)

    dataset = download_mnist(serve(servers.files(small)).url + end)

    for array, expected in zip(("x_train", "y_train", "x_test", "y_test"), small_arrays, strict=True):
        np.testing.assert_array_equal(getattr(dataset, array), expected)
    assert own.paths == []


def test_download_mnist_asks_torchvisions_mirrors_where_none_is_chosen(small, serve, own_mirrors):
    own_mirrors.append(serve(servers.files(small)).url + "/")

    assert len(download_mnist(None).x_train) == 30


WRONG = {  # what a mirror may do wrongly, and what the error says then
    "404": (servers.send(404), r"answers 404 Not Found"),
    "503": (servers.send(503), r"answers 503 Service Unavailable"),
    "206": (servers.send(206, b"part"), r"answers 206 Partial Content"),
    "login page": (servers.send(200, b"\n<html>Please sign in"), r"is not MNIST's file but a web page"),
    "other bytes": (servers.send(200, b"12345"), r"is not MNIST's file but 5 bytes"),
    "empty": (servers.send(200), r"is not MNIST's file but 0 bytes"),
    "truncated": (servers.send(200, b"12345", Content_Length=9), r"breaks off \(IncompleteRead"),
    "reset": (servers.reset, r"breaks off \(Connection reset"),
    "hung up": (servers.hang_up, r"breaks off \(Remote end closed"),
    "bad chunk": (servers.raw(OK + b"Transfer-Encoding: chunked\r\n\r\nnot hexadecimal\r\n"), r"breaks off"),
    "two lengths": (servers.raw(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n12"), r"cannot be used"),
    "not HTTP": (servers.raw(b"220 smtp ready\r\n"), r"breaks off"),
    "endless": (servers.flood(200), r"is larger than 10,000,000 bytes"),
    "byte by byte": (servers.drip(OK + b"\r\n"), r"arrives too slowly \(\d+ bytes in"),
    "header byte by byte": (servers.drip(OK + b"X: "), r"has not arrived after"),
    "chunk byte by byte": (servers.drip(OK + b"Transfer-Encoding: chunked\r\n\r\n1;"), r"has not arrived after"),
    "stalled": (servers.stall(OK + b"Content-Length: 100\r\n\r\nbeginning"), r"breaks off \(timed out\)"),
    "redirected to a file": (
        servers.send(302, Location="file:///etc/passwd"),
        r"cannot be used .*'file:///etc/passwd'",
    ),
    "redirected for ever": (servers.send(302, Location="/again"), r"cannot be used \(Exceeded 5 redirects"),
    "redirected to nobody": (servers.send(302, Location="http://127.0.0.1:1/"), r"redirects to what cannot be reached"),
    "redirected to nonsense": (servers.send(302, Location="http://[half"), r"cannot be used \(Invalid IPv6 URL"),
}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(fetch, "DEADLINE_S", 1.5)


@pytest.mark.parametrize(("answer", "says"), WRONG.values(), ids=WRONG)
def test_download_mnist_says_what_the_chosen_mirror_did(small, serve, own_mirrors, impatient, answer, says):
    own_mirrors.append(serve(servers.files(small)).url)
    mirror = serve(answer).url

    fails(mirror, rf"^MNIST_MIRROR: {mirror}/{FILES[0]} {says}.*; point MNIST_MIRROR at .*, or unset it")


@pytest.mark.parametrize(("answer", "says"), WRONG.values(), ids=WRONG)
def test_download_mnist_goes_on_from_a_bad_mirror_to_the_next(small, serve, own_mirrors, impatient, answer, says):
    own_mirrors += [serve(answer).url, serve(servers.files(small)).url]

    assert len(download_mnist(None).x_train) == 30


def test_download_mnist_keeps_the_files_that_a_failing_mirror_gave(small, serve, own_mirrors):
    good = servers.files(small)
    first, second = serve(good, good, servers.send(404)), serve(good)
    own_mirrors += [first.url, second.url]

    assert len(download_mnist(None).x_train) == 30
    assert first.paths == [f"/{name}" for name in FILES[:3]]
    assert second.paths == [f"/{name}" for name in FILES[2:]]


def test_download_mnist_lists_each_mirror_with_its_answer(serve, own_mirrors, nobody):
    own_mirrors += [serve(servers.send(404)).url, nobody, serve(servers.send(200, b"<html>")).url]

    text = fails(None, r"no mirror of MNIST works: .*; try again later, or set MNIST_MIRROR to")

    for mirror, answer in zip(own_mirrors, ["answers 404", "cannot be reached", "is not MNIST's file"], strict=True):
        assert f"{mirror.rstrip('/')}/{FILES[0]} {answer}" in text


def test_download_mnist_asks_torchvisions_mirrors_where_the_chosen_one_is_silent(small, serve, own_mirrors, nobody):
    own_mirrors.append(serve(servers.files(small)).url)

    assert len(download_mnist(nobody).x_train) == 30


# silence


@pytest.mark.parametrize("chosen", ["http://name.invalid", None])
def test_download_mnist_tells_silence_from_wrong_answers(own_mirrors, nobody, serve, impatient, chosen):
    own_mirrors += [nobody, serve(servers.stall()).url]

    text = fails(chosen, r"no mirror of MNIST answers: .*; try again later, or set MNIST_MIRROR", NoMirrorAnswersError)

    for mirror in own_mirrors if chosen is None else [chosen, *own_mirrors]:
        assert f"{mirror.rstrip('/')}/{FILES[0]} cannot be reached" in text


def test_download_mnist_takes_a_proxy_that_is_away_for_silence(nobody, monkeypatch):
    monkeypatch.setenv("https_proxy", nobody)
    monkeypatch.setenv("no_proxy", "")

    fails("https://mirror.invalid/", r"cannot be reached", NoMirrorAnswersError)


def test_download_mnist_does_not_call_a_mirror_silent_that_gave_a_file(small, serve, own_mirrors, impatient):
    own_mirrors.append(serve(servers.files(small), servers.stall()).url)

    fails(None, r"no mirror of MNIST works")


def test_download_mnist_does_not_call_a_mirror_silent_that_answered_503(serve, own_mirrors, impatient):
    own_mirrors.append(serve(servers.send(503), servers.stall()).url)

    fails(None, r"no mirror of MNIST works")


# retries


@pytest.mark.parametrize("fault", ["503", "reset", "hung up", "truncated", "stalled"])
def test_download_mnist_tries_again_after_a_passing_fault(small, serve, impatient, fault):
    answer, _ = WRONG[fault]
    server = serve(answer, answer, servers.files(small))

    assert len(download_mnist(server.url).x_train) == 30
    assert [path.strip("/") for path in server.paths] == [FILES[0], FILES[0], *FILES]


def test_download_mnist_waits_longer_before_the_last_attempt(serve, monkeypatch):
    waits = []
    monkeypatch.setattr(fetch, "RETRY_WAITS_S", (1.0, 4.0))
    monkeypatch.setattr("time.sleep", waits.append)
    server = serve(servers.send(503))

    fails(server.url, r"answers 503")

    assert waits == [1.0, 4.0]
    assert len(server.paths) == 3


@pytest.mark.parametrize("fault", ["404", "login page", "endless", "byte by byte"])
def test_download_mnist_does_not_repeat_what_would_fail_again(serve, impatient, fault):
    answer, says = WRONG[fault]
    server = serve(answer)

    fails(server.url, says)

    assert len(server.paths) == 1


# what HTTP allows


def test_download_mnist_follows_a_redirect(small, serve):
    good = serve(servers.files(small))
    redirect = lambda handler: servers.send(302, Location=good.url + handler.path)(handler)  # noqa: E731

    assert len(download_mnist(serve(redirect).url).x_train) == 30


def test_download_mnist_does_not_read_the_body_of_a_redirect(small, serve):
    sent_all = []

    def redirect(handler):
        servers.flood(302, Location=good.url + handler.path)(handler)
        sent_all.append(True)

    good = serve(servers.files(small))

    assert len(download_mnist(serve(redirect).url).x_train) == 30
    assert not sent_all


def test_download_mnist_takes_gz_files_that_are_declared_as_content_encoding(small, serve):
    def answer(handler):
        body = (small / handler.path[1:]).read_bytes()
        servers.send(200, body, Content_Encoding="gzip", Content_Length=len(body))(handler)

    assert len(download_mnist(serve(answer).url).x_train) == 30


def test_download_mnist_takes_a_chunked_answer(small, serve):
    def answer(handler):
        body = (small / handler.path[1:]).read_bytes()
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:50], body[50:]))
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")

    assert len(download_mnist(serve(answer).url).x_train) == 30


# addresses


@pytest.mark.parametrize("address", ["://nothing", "htpp://mirror/", "file:///folder", "http://", "https:///path"])
def test_download_mnist_refuses_an_address_of_another_sort(address, own_mirrors, nobody):
    own_mirrors.append(nobody)

    fails(address, r"MNIST_MIRROR: .* is neither a folder nor a URL such as https://host/path/; correct it or unset it")


@pytest.mark.parametrize("address", ["http://[half", "http://host:port", "http://two..dots/"])
def test_download_mnist_refuses_a_malformed_address(address, own_mirrors, nobody):
    own_mirrors.append(nobody)

    fails(
        address, r"MNIST_MIRROR: .* (is, or redirects to, a malformed address|cannot be used).*; point MNIST_MIRROR at"
    )


@pytest.mark.parametrize("place", ["127.0.0.1:1", "[half", "name.invalid", "127.0.0.1:1/with@sign"])
@pytest.mark.parametrize("scheme", ["http://", "HTTPS://", "htpp://", "http:/", ""])
@pytest.mark.parametrize("secret", ["secret", "secret/", "se@cret"])
def test_download_mnist_prints_no_password(scheme, place, secret, caplog):
    with pytest.raises(UserError) as error:
        download_mnist(f"{scheme}user:{secret}@{place}")

    assert "cret" not in str(error.value) + caplog.text


def test_download_mnist_prints_no_password_of_a_server_or_a_redirect(serve, caplog):
    server = serve(servers.send(302, Location="ftp://user:secret@host/"))
    address = server.url.replace("http://", "http://user:secret@")

    assert "secret" not in fails(address, rf"http://\*\*\*@127.0.0.1:{server.server_port}/") + caplog.text


def test_download_mnist_sends_the_password(small, serve):
    given = []

    def answer(handler):
        given.append(handler.headers["Authorization"])
        servers.files(small)(handler)

    download_mnist(serve(answer).url.replace("http://", "http://user:secret@"))

    assert given == ["Basic dXNlcjpzZWNyZXQ="] * 4


def test_download_mnist_prints_no_control_characters_of_a_server(serve):
    assert "\x1b" not in fails(serve(servers.raw(b"\x1b[2J\r\n")).url, "MNIST_MIRROR")
