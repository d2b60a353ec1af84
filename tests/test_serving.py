"""What a server answers with: the arrays, the packed model, who is champion, and the answers over HTTP."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import cloudpickle
import filelock
import numpy as np
import pytest
import safetensors
import torch
from mlflow import MlflowClient, pyfunc
from mlflow.models import Model

from mnist_vae.model.model_file import SavedModel, save_model
from mnist_vae.model.vae import VAE, VAEConfig
from mnist_vae.tracking import registry, serving
from mnist_vae.tracking.registry import REGISTERED, register_models
from mnist_vae.tracking.serving import Decoder, Encoder
from mnist_vae.tracking.store import DATABASE, Store
from tests.tracking import copy_store, run, start, whole_content
from tools.deployment import free_port

LATENT_DIM = 3
Z = np.array([[0.5, -1.0, 0.25], [2.0, 0.0, -3.0]], np.float32)
MEASURED_ON = {"dataset": "mnist", "binarize": "none", "images": "10000", "test_sha256": "6d87"}
FINGERPRINT = "0123456789abcdef"  # of the training


@pytest.fixture(autouse=True, scope="module")
def _no_store_from_outside():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(hidden_dims=(8,), latent_dim=LATENT_DIM)).eval()


@pytest.fixture(scope="module")
def path(vae, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "vae.safetensors"
    save_model(path, SavedModel(vae, "MNIST", [1.0, 0.5, 0.25], FINGERPRINT))
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((2, 28, 28), dtype=np.float32)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, path):
    """A folder whose store holds one registered model, the champion; read it, do not change it."""
    workspace = tmp_path_factory.mktemp("workspace")
    store = Store(workspace)
    assert register_models(store, new_run(store, "the model"), path, MEASURED_ON, 150.0)
    return workspace


@pytest.fixture
def fresh(workspace, tmp_path, monkeypatch):
    """A copy of the store to change; the files of models are not written, which takes most of the time."""
    copy_store(workspace, tmp_path)
    monkeypatch.setattr(registry, "_log_model", lambda *_: None)
    return Store(tmp_path)


def new_run(store, name):
    """The id of a run of a training of its own."""
    return store.create_run(name, "main", name, 1).info.run_id


def client_of(store):
    """The client of a store, or of a workspace's."""
    return store.client if isinstance(store, Store) else Store(store).client


def version_of(workspace, part, alias="champion"):
    return client_of(workspace).get_model_version_by_alias(REGISTERED[part], alias)


def versions_of(workspace, part):
    return client_of(workspace).search_model_versions(f"name = '{REGISTERED[part]}'")


def champions(workspace):
    """The runs of the champions, decoder and encoder."""
    return [version_of(workspace, part).run_id for part in REGISTERED]


def logged_models(workspace):
    """The models that the run shows."""
    client = client_of(workspace)
    return [
        client.get_logged_model(given.model_id)
        for given in client.get_run(champions(workspace)[0]).outputs.model_outputs
    ]


def folder_of(workspace, part):
    """Where the champion's files are."""
    version = version_of(workspace, part)
    source = client_of(workspace).get_model_version_download_uri(version.name, version.version)
    return Path(source.removeprefix("file://"))


def logits(vae, z):
    with torch.inference_mode():
        return vae.decode(torch.from_numpy(z))


# arrays in, arrays out


def test_the_decoder_gives_the_likelihoods_mean_as_images(vae):
    images = Decoder(vae).predict(Z)

    assert (images.shape, images.dtype) == ((2, 28, 28), np.float32)
    np.testing.assert_allclose(images.reshape(2, 784), torch.sigmoid(logits(vae, Z)), rtol=1e-6)


def test_the_encoder_gives_the_posteriors_mean_and_variance(vae, images):
    answer = Encoder(vae).predict(images)

    with torch.inference_mode():
        mean, log_var = vae.encode(torch.from_numpy(images).flatten(1))
    assert list(answer) == ["mean", "variance"]
    np.testing.assert_allclose(answer["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(answer["variance"], log_var.exp(), rtol=1e-6)


def test_one_is_a_batch_too(vae, images):
    assert Decoder(vae).predict(Z[:1]).shape == (1, 28, 28)
    assert Encoder(vae).predict(images[:1])["variance"].shape == (1, LATENT_DIM)


def test_what_the_decoder_gives_the_encoder_takes(vae):
    assert Encoder(vae).predict(Decoder(vae).predict(1e3 * Z))["mean"].shape == (2, LATENT_DIM)


@pytest.mark.parametrize("pixel", [-0.01, 1.01, 255, np.nan])
def test_pixels_outside_of_0_to_1_are_refused(vae, images, pixel):
    images = images.copy()
    images[1, 3, 4] = pixel

    with pytest.raises(ValueError, match=r"\[0, 1\]; divide"):
        Encoder(vae).predict(images)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_z_must_be_finite(vae, value):
    with pytest.raises(ValueError, match="finite"):
        Decoder(vae).predict(np.array([[0, 0, value]], np.float32))


# the packed model


@pytest.mark.parametrize("part", REGISTERED)
def test_a_model_is_its_file_and_the_code_that_serves_it(workspace, path, part):
    folder = folder_of(workspace, part)

    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    code = {f"code/mnist_vae/{file.relative_to(serving.LIBRARY)}" for file in serving.PACKED}
    about = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
    examples = {"input_example.json", "serving_input_example.json"}
    assert files == {"data/vae.safetensors"} | code | about | examples
    assert (folder / "data/vae.safetensors").read_bytes() == path.read_bytes()
    for file in serving.PACKED:
        assert (folder / "code/mnist_vae" / file.relative_to(serving.LIBRARY)).read_bytes() == file.read_bytes()


def test_the_packed_code_answers_by_itself_with_few_packages(workspace, vae):
    program = """
sys.path.insert(0, str(workspace / "code"))
from mnist_vae.tracking.serving import _load_pyfunc
import numpy
print(_load_pyfunc(str(workspace / "data" / "vae.safetensors"), {"part": "decoder"}).predict(numpy.ones((1, 3))).sum())
print(*sorted({getattr(module, "__file__", "") or "" for name, module in sys.modules.items() if "mnist_vae" in name}))
print(*sorted({name for name in ("mlflow", "lightning", "sklearn", "pydantic", "PIL") if name in sys.modules}))
"""
    folder = folder_of(workspace, "decoder")
    answer, files, others = run(program, folder).splitlines()

    assert float(answer) == pytest.approx(Decoder(vae).predict(np.ones((1, LATENT_DIM), np.float32)).sum(), rel=1e-5)
    assert all(file.startswith(str(folder / "code")) for file in files.split())
    assert others == ""


@pytest.mark.parametrize(
    ("part", "inputs", "outputs"),
    [
        ("decoder", [(None, (-1, LATENT_DIM))], [(None, (-1, 28, 28))]),
        ("encoder", [(None, (-1, 28, 28))], [("mean", (-1, LATENT_DIM)), ("variance", (-1, LATENT_DIM))]),
    ],
)
def test_the_signature_has_names_shapes_and_float32(workspace, part, inputs, outputs):
    signature = Model.load(folder_of(workspace, part)).signature

    for schema, expected in ((signature.inputs, inputs), (signature.outputs, outputs)):
        assert [(spec.name, spec.shape) for spec in schema.inputs] == expected
        assert {spec.type for spec in schema.inputs} == {np.dtype("float32")}


@pytest.mark.parametrize(("part", "shape"), [("decoder", (1, LATENT_DIM)), ("encoder", (1, 28, 28))])
def test_the_example_is_an_input_that_the_model_takes(workspace, vae, part, shape):
    folder = folder_of(workspace, part)
    example = Model.load(folder).load_input_example(str(folder))

    assert example.shape == shape
    serving.SERVED[part](vae).predict(example.astype(np.float32))


def test_the_requirements_are_the_versions_that_run(workspace):
    lines = (folder_of(workspace, "decoder") / "requirements.txt").read_text().split()

    assert lines[0].startswith("mlflow==")
    versions = {"numpy": np.__version__, "safetensors": safetensors.__version__, "torch": torch.__version__}
    assert lines[1:] == [f"{package}=={version.partition('+')[0]}" for package, version in versions.items()]


@pytest.mark.parametrize("part", REGISTERED)
def test_a_model_loads_without_pickle_and_answers_as_before(workspace, vae, images, part, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("unpickled")

    for module in (pickle, cloudpickle):
        for name in ("load", "loads", "Unpickler", "_Unpickler"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(sys, "path", sys.path)  # MLflow puts the model's code in front, for good
    given = {"decoder": Z, "encoder": images}[part]

    answer = pyfunc.load_model(str(folder_of(workspace, part))).predict(given)

    expected = serving.SERVED[part](vae).predict(given)
    np.testing.assert_equal(answer, expected)


def test_the_run_shows_its_models(workspace):
    run_id, _ = champions(workspace)

    logged = logged_models(workspace)
    assert sorted(model.name for model in logged) == ["decoder", "encoder"]
    assert {(str(model.status), model.source_run_id) for model in logged} == {("READY", run_id)}
    assert {Path(model.artifact_location.removeprefix("file://")) for model in logged} == {
        folder_of(workspace, "decoder"),
        folder_of(workspace, "encoder"),
    }


# the registry


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_version_tells_its_run_what_it_was_measured_on_and_how_good_it_is(workspace, part):
    version = version_of(workspace, part)

    assert version.name == f"mnist-vae-{part}"
    assert client_of(workspace).get_run(version.run_id).info.run_name == "the model"
    about = {"dataset": "mnist", "binarize": "none", "images": "10000", "test_sha256": "6d87", "nll": "150.0"}
    assert {name: version.tags[name] for name in about} == about


@pytest.mark.parametrize(
    ("changed", "nll", "moves"),
    [
        ({}, 149.9, True),
        ({}, 150.1, False),
        ({}, 150.0, False),
        ({}, 99.0, True),  # as numbers, not as text
        ({"dataset": "digits"}, 100.0, False),
        ({"test_sha256": "0123"}, 100.0, False),
        ({"binarize": "static"}, 100.0, False),
    ],
    ids=["better", "worse", "equal", "better by a digit", "other data set", "other images", "other binarisation"],
)
def test_the_champion_changes_only_for_a_lower_nll_on_the_same(fresh, path, changed, nll, moves):
    (before,) = set(champions(fresh))
    challenger = new_run(fresh, "challenger")

    assert register_models(fresh, challenger, path, MEASURED_ON | changed, nll) is moves

    assert champions(fresh) == [challenger if moves else before] * 2
    assert [len(versions_of(fresh, part)) for part in REGISTERED] == [2, 2]


def test_without_champions_any_model_becomes_one(fresh, path):
    for name in REGISTERED.values():
        fresh.client.delete_registered_model_alias(name, "champion")
    another = new_run(fresh, "another")

    assert register_models(fresh, another, path, MEASURED_ON, 999.0)

    assert champions(fresh) == [another, another]


def test_a_champion_whose_run_was_deleted_makes_room_for_any_other(fresh, path):
    fresh.client.delete_run(champions(fresh)[0])
    another = new_run(fresh, "another")

    assert register_models(fresh, another, path, MEASURED_ON, 999.0)

    assert champions(fresh) == [another, another]


@pytest.mark.parametrize("part", REGISTERED)
def test_decoder_and_encoder_are_one_models_again_when_a_process_was_killed_between_them(fresh, path, part):
    (before,) = set(champions(fresh))
    fresh.client.delete_registered_model_alias(REGISTERED[part], "champion")

    assert not register_models(fresh, new_run(fresh, "worse"), path, MEASURED_ON, 151.0)

    assert champions(fresh) == [before, before]


def test_the_encoder_follows_a_decoder_that_has_become_champion_without_it(fresh, path):
    better = new_run(fresh, "better")
    assert register_models(fresh, better, path, MEASURED_ON, 140.0)
    fresh.client.set_registered_model_alias(REGISTERED["encoder"], "champion", "1")
    assert len(set(champions(fresh))) == 2

    assert not register_models(fresh, new_run(fresh, "between"), path, MEASURED_ON, 145.0)

    assert champions(fresh) == [better, better]


def test_registering_twice_changes_nothing(fresh, path):
    run_id = new_run(fresh, "another")
    register_models(fresh, run_id, path, MEASURED_ON, 149.0)
    before = whole_content(fresh.workspace)

    assert register_models(fresh, run_id, path, MEASURED_ON, 149.0)

    assert whole_content(fresh.workspace) == before


def test_a_model_that_is_measured_again_stays_one_version_with_the_new_numbers(fresh, path):
    run_id = champions(fresh)[0]

    assert register_models(fresh, run_id, path, MEASURED_ON, 150.5)

    for part in REGISTERED:
        (version,) = versions_of(fresh, part)
        assert version.tags["nll"] == "150.5"
    assert champions(fresh) == [run_id, run_id]


def test_another_model_of_the_same_run_is_another_version(fresh, path, tmp_path):
    other = tmp_path / "vae.safetensors"
    save_model(other, SavedModel(VAE(VAEConfig((8,), LATENT_DIM)), "MNIST", [0.0] * LATENT_DIM, FINGERPRINT))

    assert register_models(fresh, champions(fresh)[0], other, MEASURED_ON, 149.0)

    assert [len(versions_of(fresh, part)) for part in REGISTERED] == [2, 2]
    assert int(version_of(fresh, "decoder").version) == 2


def test_the_same_model_served_by_other_code_is_another_version(fresh, path, tmp_path, monkeypatch):
    changed = tmp_path / "serving.py"
    changed.write_text("# changed\n")
    monkeypatch.setattr(serving, "PACKED", [*serving.PACKED[:-1], changed])

    register_models(fresh, champions(fresh)[0], path, MEASURED_ON, 150.0)

    assert [len(versions_of(fresh, part)) for part in REGISTERED] == [2, 2]


def test_a_champion_that_somebody_chose_by_hand_stands_in_nobodys_way(fresh, path):
    name = REGISTERED["decoder"]
    fresh.client.create_model_version(name, "file:///elsewhere", champions(fresh)[0])
    fresh.client.set_registered_model_alias(name, "champion", "2")

    assert not register_models(fresh, new_run(fresh, "better"), path, MEASURED_ON, 100.0)

    assert int(version_of(fresh, "decoder").version) == 2


def test_no_other_process_comes_between_the_question_and_the_move(fresh, path, monkeypatch):
    def is_locked():
        with pytest.raises(filelock.Timeout), filelock.FileLock(fresh.workspace / "mlflow.db.lock", timeout=0):
            pass

    asked = []
    for name in ("search_model_versions", "get_registered_model", "set_registered_model_alias"):
        original = getattr(MlflowClient, name)

        def checked(*args, name=name, original=original, **kwargs):
            is_locked()
            asked.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, checked)
    register_models(fresh, new_run(fresh, "better"), path, MEASURED_ON, 149.0)

    assert set(asked) == {"search_model_versions", "get_registered_model", "set_registered_model_alias"}


@pytest.mark.parametrize("theirs", [140.0, 147.0])
@pytest.mark.parametrize("moment", range(1, 5))
def test_of_two_machines_that_move_the_champion_at_once_the_better_model_is_left(
    fresh, path, tmp_path, monkeypatch, moment, theirs
):
    """The other machine comes before the first, second, … change that this one makes to aliases and their tags."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{fresh.workspace / DATABASE}")
    elsewhere = Store(tmp_path / "elsewhere")  # a lock of its own
    elsewhere.workspace.mkdir()
    here, there = new_run(fresh, "here"), new_run(fresh, "there")
    changes = []

    def before(change):
        def changed(*arguments):
            changes.append(change)
            if len(changes) == moment:
                register_models(elsewhere, there, path, MEASURED_ON, theirs)
            return change(*arguments)

        return changed

    for name in ("set_registered_model_alias", "set_model_version_tag"):
        monkeypatch.setattr(fresh.client, name, before(getattr(fresh.client, name)))
    is_champion = register_models(fresh, here, path, MEASURED_ON, 145.0)

    assert len(changes) >= 4
    assert champions(fresh) == [here if theirs > 145 else there] * 2
    assert is_champion is (theirs > 145)


@pytest.mark.slow
def test_registering_prints_nothing_of_mlflows(fresh, path):
    program = f"""
from mnist_vae.tracking.store import Store
from mnist_vae.tracking.registry import register_models
store = Store(workspace)
run_id = store.create_run("quiet", "main", "quiet", 1).info.run_id
print(register_models(store, run_id, Path(sys.argv[2]), {MEASURED_ON!r}, 149.0))
"""
    process = start(program, fresh.workspace, path)

    assert process.communicate(timeout=300) == ("True\n", "")


# over HTTP, as the README has it


@pytest.fixture(scope="module")
def servers(workspace):
    """The addresses of two servers, started in the workspace as in the repository, without the library on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    scripts = str(Path(sys.executable).parent)
    environment |= {"PATH": f"{scripts}{os.pathsep}{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        addresses = {}
        for part, name in REGISTERED.items():
            port, log = free_port(), workspace / f"{part}.log"
            command = f"mlflow models serve -m models:/{name}@champion --env-manager local -p {port}"
            stack.enter_context(serve(command.split(), workspace, environment, log))
            addresses[part] = f"http://127.0.0.1:{port}", log
        for address, log in addresses.values():
            wait_for(f"{address}/ping", log, seconds=90)
        yield {part: address for part, (address, _) in addresses.items()}


@contextlib.contextmanager
def serve(command, folder, environment, log):
    """A server in a process group of its own, which ends with it."""
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def wait_for(url, log, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    pytest.fail(f"{url} does not answer after {seconds} s:\n{log.read_text()}")


def ask(address, inputs):
    """The status and the JSON of an answer to ``inputs``."""
    request = urllib.request.Request(
        f"{address}/invocations",
        data=json.dumps({"inputs": inputs}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_a_server_answers_z_with_images(servers, vae):
    status, answer = ask(servers["decoder"], Z.tolist())

    assert status == 200
    assert np.shape(answer["predictions"]) == (2, 28, 28)
    np.testing.assert_allclose(
        np.reshape(answer["predictions"], (2, 784)), torch.sigmoid(logits(vae, Z)), rtol=1e-5, atol=1e-7
    )


@pytest.mark.slow
def test_a_server_answers_images_with_mean_and_variance(servers, vae, images):
    status, answer = ask(servers["encoder"], images.tolist())

    with torch.inference_mode():
        mean, log_var = vae.encode(torch.from_numpy(images).flatten(1))
    assert status == 200
    np.testing.assert_allclose(answer["predictions"]["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(answer["predictions"]["variance"], log_var.exp(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "inputs", "reason"),
    [
        ("decoder", [[0.0, 0.0]], f"Shape of input (1, 2) does not match expected shape (-1, {LATENT_DIM})"),
        ("decoder", [0.0] * LATENT_DIM, f"Shape of input ({LATENT_DIM},) does not match"),
        ("decoder", [["a"] * LATENT_DIM], "could not convert string to float"),
        ("encoder", np.zeros((1, 784)).tolist(), "Shape of input (1, 784) does not match expected shape (-1, 28, 28)"),
        ("encoder", np.full((1, 28, 28), 255).tolist(), "pixels must be in [0, 1]; divide those of 0 to 255 by 255"),
    ],
    ids=["z too short", "no batch", "text", "flat image", "pixels to 255"],
)
def test_a_server_says_what_is_wrong_with_a_request(servers, part, inputs, reason):
    status, answer = ask(servers[part], inputs)

    assert status == 400
    assert reason in answer["message"] + answer.get("stack_trace", "")


@pytest.mark.slow
def test_a_server_runs_the_models_own_code(servers, workspace):
    _, answer = ask(servers["encoder"], np.full((1, 28, 28), 255).tolist())

    assert str(folder_of(workspace, "encoder") / "code/mnist_vae/tracking/serving.py") in answer["stack_trace"]
