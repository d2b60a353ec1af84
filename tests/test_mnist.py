"""MNIST from folders, from servers on this machine, and from servers that fail in the ways that servers do."""

import contextlib
import gzip
import http.server
import shutil
import socket
import threading
from functools import partial

import numpy as np
import pytest

from mnist_vae.errors import UserError
from mnist_vae.mnist import MNIST, NoMirrorAnswersError, download_mnist

FILES = [filename for filename, _ in MNIST.resources]


@pytest.fixture(autouse=True)
def own_mirrors(monkeypatch):
    """torchvision's own mirrors; empty, so that no test reaches for the network."""
    mirrors = []
    monkeypatch.setattr(MNIST, "mirrors", mirrors)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return mirrors


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def copy(mnist_folder, tmp_path):
    """A folder with the four files, for a test to damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(mnist_folder / name, folder / name)
    return folder


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Garbage(Silent):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Please sign in to the guest network</html>")


class Unavailable(Silent):
    def do_GET(self):
        self.send_error(503)


@pytest.fixture
def serve():
    """Start a server of some kind on this machine and give its address."""
    with contextlib.ExitStack() as stack:

        def serve(handler):
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield serve


@pytest.fixture
def nobody():
    """An address where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/"


def assert_is_mnist(dataset):
    assert dataset.name == "mnist"
    assert dataset.x_train.shape == (60_000, 28, 28)
    assert dataset.x_test.shape == (10_000, 28, 28)
    assert dataset.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert {getattr(dataset, array).dtype for array in ("x_train", "y_train", "x_test", "y_test")} == {
        np.dtype("uint8")
    }


# a folder


def test_mnist_comes_from_a_folder(mnist_folder, temporary):
    dataset = download_mnist(str(mnist_folder))

    assert_is_mnist(dataset)
    assert dataset.x_train.reshape(60_000, -1).mean() == pytest.approx(0.1307 * 255, rel=1e-3)  # known from everywhere
    assert list(temporary.iterdir()) == []


def test_a_folder_that_does_not_exist_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"MNIST_MIRROR: .*nowhere.* does not exist; point MNIST_MIRROR at") as error:
        download_mnist(str(tmp_path / "nowhere"))

    assert not isinstance(error.value, NoMirrorAnswersError)


def test_a_folder_without_the_files_is_a_mistake(tmp_path, own_mirrors, nobody):
    own_mirrors.append(nobody)
    with pytest.raises(UserError, match=FILES[0]) as error:
        download_mnist(str(tmp_path))

    assert not isinstance(error.value, NoMirrorAnswersError)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_a_folder_lacks_is_named(copy, name):
    (copy / name).unlink()

    with pytest.raises(UserError, match=rf"{name} does not exist"):
        download_mnist(str(copy))


@pytest.mark.parametrize("name", [FILES[1], FILES[3]])
def test_a_truncated_file_in_a_folder_is_named(copy, name, temporary):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-100])

    with pytest.raises(UserError, match=rf"{name} is not MNIST's"):
        download_mnist(str(copy))

    assert list(temporary.iterdir()) == []


def test_other_images_in_mnists_format_are_no_mnist(copy):
    content = bytearray(gzip.decompress((copy / FILES[3]).read_bytes()))
    content[-1] = (content[-1] + 1) % 10
    (copy / FILES[3]).write_bytes(gzip.compress(content))

    with pytest.raises(UserError, match=rf"{FILES[3]} is not MNIST's"):
        download_mnist(str(copy))


# servers


@pytest.mark.parametrize("end", ["", "/"])
def test_mnist_comes_from_a_server(mnist_folder, serve, temporary, end):
    assert_is_mnist(download_mnist(serve(partial(Silent, directory=mnist_folder)) + end))
    assert list(temporary.iterdir()) == []


def test_mnist_comes_from_torchvisions_mirrors_where_none_is_named(mnist_folder, serve, own_mirrors):
    own_mirrors.append(serve(partial(Silent, directory=mnist_folder)) + "/")

    assert_is_mnist(download_mnist(None))


@pytest.mark.parametrize("kind", ["garbage", "nobody", "unavailable"])
def test_the_next_mirror_is_tried(mnist_folder, serve, own_mirrors, nobody, kind):
    first = {"garbage": partial(serve, Garbage), "unavailable": partial(serve, Unavailable), "nobody": lambda: nobody}
    own_mirrors += [first[kind]() + "/", serve(partial(Silent, directory=mnist_folder)) + "/"]

    assert_is_mnist(download_mnist(None))


def test_a_server_without_the_files_is_a_mistake_with_its_address(serve, tmp_path, own_mirrors, nobody, temporary):
    own_mirrors.append(nobody)
    mirror = serve(partial(Silent, directory=tmp_path))

    with pytest.raises(UserError, match=rf"{mirror}/{FILES[0]} answers 404 .*; point MNIST_MIRROR at") as error:
        download_mnist(mirror)

    assert not isinstance(error.value, NoMirrorAnswersError)
    assert list(temporary.iterdir()) == []


def test_garbage_is_not_taken_for_mnist(serve, temporary):
    mirror = serve(Garbage)

    with pytest.raises(UserError, match=rf"{FILES[0]} from {mirror}/ is not MNIST's \(damaged") as error:
        download_mnist(mirror)

    assert not isinstance(error.value, NoMirrorAnswersError)
    assert list(temporary.iterdir()) == []


def test_where_nobody_answers_the_error_says_so(own_mirrors, nobody, temporary):
    own_mirrors.append(f"{nobody}own/")

    with pytest.raises(NoMirrorAnswersError, match=r"set MNIST_MIRROR to a URL or to a folder") as error:
        download_mnist(nobody)

    assert nobody in str(error.value)
    assert own_mirrors[0] in str(error.value)
    assert list(temporary.iterdir()) == []


def test_torchvisions_mirrors_being_down_is_nobodys_mistake(serve, own_mirrors):
    own_mirrors.append(serve(Unavailable) + "/")

    with pytest.raises(NoMirrorAnswersError, match=r"503|Service Unavailable"):
        download_mnist(None)


def test_a_server_that_keeps_silent_is_given_up(monkeypatch):
    monkeypatch.setattr("mnist_vae.mnist.TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        hang_up = threading.Timer(10, listening.close)  # so that a wait without a limit ends too
        hang_up.start()
        with pytest.raises(NoMirrorAnswersError, match="timed out"):
            download_mnist(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        hang_up.cancel()

    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("address", ["http://[half", "://nothing", "htpp://mirror/"])
def test_an_address_that_is_none_is_a_mistake(address, own_mirrors, nobody):
    own_mirrors.append(nobody)

    with pytest.raises(UserError, match=r"MNIST_MIRROR: .* is neither a folder nor a URL") as error:
        download_mnist(address)

    assert not isinstance(error.value, NoMirrorAnswersError)
