"""One measurement in a process of its own:   python -m benchmarks.worker TASK '{"argument": …}'   → a line of JSON.

A task imports what it needs and nothing else. The folder ``measure.Worker`` starts it in holds what ``prepare`` made.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools.clone import ROOT

DATASET = Path("dataset")
TRAINED = Path("vae.safetensors")
MLFLOW_TIME_LIMIT_S = 120  # for the process beside a training to load MLflow and to make its database


def prepare() -> dict[str, Any]:
    """MNIST into the current folder: as arrays for the pipeline's side, as torchvision keeps it for the notebook's.

    Raises:
        UserError: there is no MNIST. Nothing else is measured in its place.
    """
    from benchmarks.notebook import fetch_mnist
    from mnist_vae.data.dataset import save_dataset
    from mnist_vae.model.latent import mean_kld
    from mnist_vae.model.model_file import SavedModel, save_model
    from mnist_vae.model.vae import VAEConfig
    from mnist_vae.sources.mnist import download_mnist
    from mnist_vae.training.fit import fit

    mirror = os.environ.get("MNIST_MIRROR")
    mnist = download_mnist(mirror)
    save_dataset(DATASET, mnist)
    fetch_mnist(mirror)

    quick = settings(epochs=1, batch_size=256, learning_rate=5e-3, schedule="one_cycle", accelerator="cpu")
    vae = fit(mnist.x_train, VAEConfig(), quick).vae
    save_model(TRAINED, SavedModel(vae, mnist.title, mean_kld(vae, mnist.x_test), "benchmark"))
    return {}


def bare(epochs: int, images: int | None = None, device: str = "cpu", **changes: Any) -> dict[str, Any]:
    """Seconds of each epoch of the bare loop."""
    import torch

    from benchmarks.bare import bare_loop

    history = bare_loop(torch.from_numpy(training_images(images)).flatten(1), settings(**changes), epochs, device)
    return {"seconds": [epoch.seconds for epoch in history], "losses": [epoch.loss for epoch in history]}


def notebook(epochs: int, steps: int | None = None) -> dict[str, Any]:
    """Seconds of each epoch of the notebook's loop."""
    from benchmarks.notebook import Notebook

    return {"seconds": Notebook(settings()).train(epochs, steps)}


def whole_notebook(epochs: int) -> dict[str, Any]:
    """All that the notebook does, from its imports to its last picture, in a new folder."""
    from benchmarks.notebook import Notebook, fetch_mnist

    params = parameters()
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        cells = Notebook(params.train)
        fetch_mnist(os.environ.get("MNIST_MIRROR"))
        seconds = cells.train(epochs)
        png_bytes = cells.draw(params.samples, params.grid)
    return {"seconds": seconds, "png_bytes": png_bytes}


def pipeline(
    images: int | None = None,
    test: bool = False,
    kept: bool = True,
    profiled: bool = False,
    workspace: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """``fit`` as the stage train runs it, changed parameters aside; with ``devices`` in so many processes.

    ``kept``: with a checkpoint and the losses and samples of each epoch, which go to the journal and on to MLflow.
    ``workspace``: where the journal stays, so that what MLflow has not received can be sent later.
    Gives ``seconds`` per epoch; ``total``, those of the whole loop; where asked for ``test_loss`` in nats per image,
    and, ``profiled`` and so slowed down, ``working``: the seconds of the last epoch in which the device works.
    """
    from benchmarks.clock import DeviceClock, EpochClock
    from mnist_vae.model.vae import VAEConfig
    from mnist_vae.training.fit import fit
    from mnist_vae.training.processes import processes

    train, x_train = settings(**{"accelerator": "cpu", **changes}), training_images(images)
    clock, device_clock = EpochClock(), DeviceClock()
    with processes(train, [sys.executable, "-m", "benchmarks.worker", *sys.argv[1:]]) as group, ExitStack() as stack:
        arguments: dict[str, Any] = {"callbacks": [] if kept else [without_checkpoints()]}
        if kept and group.place.rank == 0:
            arguments = stack.enter_context(keeping(train.seed, workspace))
        arguments["callbacks"] += [clock, device_clock] if profiled else [clock]
        group.join({})
        trained = fit(x_train, VAEConfig(), train, **arguments)
    result = {"seconds": clock.seconds, "total": trained.seconds, "data_bytes": x_train.nbytes}
    if profiled:
        result["working"] = device_clock.seconds
    if test:
        result["test_loss"] = test_loss(trained.vae, train.kl_weight)
    return result


@contextlib.contextmanager
def keeping(seed: int, workspace: str | None = None) -> Iterator[dict[str, Any]]:
    """What the stage train gives ``fit`` so that nothing is lost, in a workspace on the project's own disk.

    MLflow is loaded when training begins, unless it is on a server; what that costs belongs to the start of a stage.
    """
    from mnist_vae.model.vae import VAEConfig
    from mnist_vae.tracking.logger import JournalLogger
    from mnist_vae.tracking.session import Session
    from mnist_vae.training.callbacks import SampleFrames

    disk = ROOT / ".dvc" / "tmp"
    disk.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="benchmark-", dir=disk, ignore_cleanup_errors=True) as scratch:
        folder = workspace or scratch
        session = Session(Path(folder), "train")
        deadline = time.monotonic() + MLFLOW_TIME_LIMIT_S
        while not os.environ.get("MLFLOW_TRACKING_URI") and not Path(folder, "mlflow.db").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"MLflow has made no database within {MLFLOW_TIME_LIMIT_S} s")
            time.sleep(0.1)
        session.begin("benchmark", "", "benchmark", {}, {})
        yield {
            "logger": JournalLogger(session),
            "callbacks": [SampleFrames(VAEConfig().latent_dim, seed)],
            "checkpoints": Path(folder, "checkpoints"),
        }
        session.end("FINISHED")
        if workspace is None and (reason := session.outcome.get("reason")):
            raise RuntimeError(f"MLflow has not received everything: {reason}")


def without_checkpoints() -> Any:
    """A callback that takes out the checkpoints, which ``fit`` also keeps where nobody will resume."""
    from lightning.pytorch.callbacks import Callback, Checkpoint

    class WithoutCheckpoints(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, Checkpoint)]

    return WithoutCheckpoints()


def test_loss(vae: Any, kl_weight: float) -> float:
    """The loss on the test images, nats per image."""
    from mnist_vae.evaluation.evaluate import sampled_bce, summarise_elbo
    from mnist_vae.model.cpu import set_up_cpu
    from mnist_vae.model.latent import encode, to_tensor

    set_up_cpu(1)
    x_test, evaluation = dataset().x_test, parameters().evaluate
    posterior = encode(vae, x_test)
    bce = sampled_bce(vae, to_tensor(x_test), posterior, evaluation.draws, evaluation.seed)
    return float(summarise_elbo(bce, posterior.kld().double(), kl_weight)["loss"])


def synthetic(images: int) -> dict[str, Any]:
    """A data set of MNIST's training images over and over, written to large-IMAGES without being in memory."""
    import numpy as np

    from mnist_vae.data.dataset import Dataset, Selection, save_dataset

    mnist = dataset()
    positions = np.arange(images) % len(mnist.x_train)
    repeated_images = Selection(mnist.x_train, positions)
    save_dataset(Path(f"large-{images}"), Dataset("synthetic/", repeated_images, None, mnist.x_test, None))
    return {}


def large(images: int, memory: int | None = None) -> dict[str, Any]:
    """Seconds of an epoch on the images that ``synthetic`` wrote, from its start, hashes of the file included in none.

    With ``memory`` the process may have no more bytes of its own than that, and gathers from the mapped file in windows
    of a tenth of the images, or a million; without it the images are in memory.
    """
    from benchmarks.clock import EpochClock
    from mnist_vae.data.dataset import load_dataset
    from mnist_vae.model.vae import VAEConfig
    from mnist_vae.training import data_module
    from mnist_vae.training.fit import fit

    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    data_module.IN_MEMORY = 2**50 if memory is None else 0
    window = 1_000_000 if memory is None else min(1_000_000, images // 10)
    train, clock = settings(accelerator="cpu", epochs=1, shuffle_window=window), EpochClock()
    images_of = load_dataset(f"large-{images}").x_train
    fit(images_of, VAEConfig(), train, callbacks=[without_checkpoints(), clock])
    return {"seconds": clock.seconds, "data_bytes": images * 784}


def evaluate(estimator: str, images: int, draws: int) -> dict[str, Any]:
    """Seconds of one estimator on test images, by repetition, with so many draws of z per image."""
    from mnist_vae.evaluation.evaluate import sampled_bce
    from mnist_vae.evaluation.likelihood import importance_nll, quadrature_nll
    from mnist_vae.model.latent import encode, to_tensor
    from mnist_vae.model.model_file import load_model

    vae, x_test = load_model(TRAINED).vae, dataset().x_test
    step = parameters().evaluate.quadrature_step
    run = {
        "ELBO": lambda x: sampled_bce(vae, to_tensor(x), encode(vae, x), draws, seed=1),
        "importance sampling": lambda x: importance_nll(vae, to_tensor(x), draws),
        "quadrature": lambda x: quadrature_nll(vae, to_tensor(x), step),
    }[estimator]
    run(x_test[:100])  # warm-up
    x = repeated(x_test, images)
    started = time.perf_counter()
    run(x)
    return {"seconds": [time.perf_counter() - started], "data_bytes": x.nbytes}


def scheduling(tasks: int) -> dict[str, Any]:
    """Seconds for so many empty tasks on Dask, and the bytes by which this process, the scheduler, grew."""
    import psutil
    from distributed import Client, LocalCluster, wait

    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster) as client:
        client.gather(client.map(abs, range(100)))  # warm-up
        before = psutil.Process().memory_info().rss
        started = time.perf_counter()
        futures = client.map(abs, range(-tasks, 0))
        wait(futures)
        return {"seconds": time.perf_counter() - started, "grown": psutil.Process().memory_info().rss - before}


def gpu() -> dict[str, Any]:
    """Name of the GPU, None without one, and torch's version."""
    import torch

    return {"name": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch": torch.__version__}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task
    for task in (prepare, bare, notebook, whole_notebook, pipeline, synthetic, large, evaluate, scheduling, gpu)
}


def parameters():
    from mnist_vae.params import load_params

    return load_params(ROOT / "params.yaml")


def settings(**changes: Any):
    """params.yaml's train section, changed and checked."""
    from mnist_vae.params import Train

    return Train(**{**parameters().train.model_dump(), **changes})


def dataset():
    from mnist_vae.data.dataset import load_dataset

    return load_dataset(DATASET)


def training_images(count: int | None):
    x_train = dataset().x_train
    return x_train if count is None else repeated(x_train, count)


def repeated(images, count: int):
    """The first ``count`` of images (N, 28, 28) that begin again after the last, as an array of its own."""
    import numpy as np

    copy = np.empty((count, *images.shape[1:]), images.dtype)
    for first in range(0, count, len(images)):
        copy[first : first + len(images)] = images[: count - first]
    return copy


def peak_bytes() -> int:
    """The most memory this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    task, arguments = sys.argv[1], json.loads(sys.argv[2])
    if cpus := arguments.pop("cpus", None):
        os.sched_setaffinity(0, cpus)
    threads = arguments.pop("threads")
    with contextlib.redirect_stdout(sys.stderr):  # progress bars; stdout is for the result
        from mnist_vae.portable import set_up_libraries

        if threads == 1 and task not in ("bare", "notebook", "whole_notebook"):  # these take torch as it is
            set_up_libraries()
        from mnist_vae.compat import cure_torchvision
        from mnist_vae.errors import UserError
        from mnist_vae.model.cpu import set_up_cpu

        cure_torchvision()  # before a task imports lightning
        if "notebook" in task:
            import torch

            torch.set_num_threads(threads)
        else:
            set_up_cpu(threads)
        try:
            result = TASKS[task](**arguments)
        except UserError as error:
            sys.exit(str(error))
    if os.environ.get("RANK", "0") == "0":  # the first, if there are several
        print(json.dumps({**result, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
