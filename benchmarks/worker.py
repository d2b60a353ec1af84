"""One measurement in a process of its own:   python -m benchmarks.worker TASK '{"argument": …}'   → a line of JSON.

A task imports what it needs and nothing else. The folder ``measure.Worker`` starts it in holds what ``prepare`` made.
"""

import contextlib
import importlib
import inspect
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import ROOT
from benchmarks.accounts import Accounts

DATASET = Path("dataset.npz")
TRAINED = Path("vae.pt")


def prepare() -> dict[str, Any]:
    """MNIST into the current folder: as arrays for the pipeline's side, as torchvision keeps it for the notebook's.

    Raises:
        UserError: MNIST is not to be had. Nothing else is measured in its place.
    """
    from benchmarks.notebook import fetch_mnist
    from mnist_vae.data.dataset import save_dataset
    from mnist_vae.sources.mnist import download_mnist

    mirror = os.environ.get("MNIST_MIRROR")
    dataset = download_mnist(mirror)
    save_dataset(DATASET, dataset)
    fetch_mnist(mirror)

    from mnist_vae.model.model_file import Checkpoint, save_model
    from mnist_vae.training.fit import fit
    from mnist_vae.model.vae import VAEConfig

    quick = settings(epochs=1, batch_size=256, learning_rate=5e-3, schedule="one_cycle", accelerator="cpu")
    save_model(TRAINED, Checkpoint(fit(dataset.x_train, VAEConfig(), quick).vae, dataset.name, []))
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


def pipeline(images: int | None = None, test: bool = False, **changes: Any) -> dict[str, Any]:
    """``fit`` as the stage train runs it, with each epoch logged to an MLflow store, changed parameters aside.

    ``seconds`` and ``tracking`` per epoch, the former with the latter in it (and the first with the trainer's start);
    ``total``, the loop's own seconds; ``test_loss`` in nats per image where asked for.
    """

    from mnist_vae.pictures import figures, tracking
    from mnist_vae.model.latent import decode, prior_draws
    from mnist_vae.training.fit import Epoch, fit
    from mnist_vae.model.vae import VAEConfig

    train, x_train = settings(**{"accelerator": "cpu", **changes}), training_images(images)
    z, ends, tracked = prior_draws(4 * 18, 2, train.seed), [], []
    with TemporaryDirectory() as store, tracking.start_run(Path(store), "benchmark", {}) as run:

        def log_epoch(epoch: Epoch) -> None:
            started = time.perf_counter()
            run.log_metrics({f"train_{name}": value for name, value in epoch.losses.items()}, step=epoch.number)
            picture = figures.to_uint8(figures.tile(decode(epoch.vae, z.to(epoch.vae.device)), 18))
            run.log_image(picture, "samples", step=epoch.number)
            ends.append(time.perf_counter())
            tracked.append(ends[-1] - started)

        started = time.perf_counter()
        trained = fit(x_train, VAEConfig(), train, log_epoch)
    seconds = [end - start for start, end in zip([started, *ends], ends, strict=False)]
    result = {"seconds": seconds, "tracking": tracked, "total": trained.seconds, "data_bytes": x_train.nbytes}
    if test:
        from mnist_vae.model.cpu import set_up_cpu
        from mnist_vae.evaluation.evaluate import encode, sampled_bce, summarise_elbo, to_tensor

        set_up_cpu(1)
        x_test, evaluation = dataset().x_test, parameters().evaluate
        posterior = encode(trained.vae, x_test)
        bce = sampled_bce(trained.vae, to_tensor(x_test), posterior, evaluation.draws, evaluation.seed)
        result["test_loss"] = summarise_elbo(bce, posterior.kld().double(), train.kl_weight)["loss"]
    return result


def evaluate(estimator: str, images: int, effort: int) -> dict[str, Any]:
    """Seconds of one estimator on test images, by repetition; ``effort`` is the draws or importance samples of z."""
    from mnist_vae.model.model_file import load_model
    from mnist_vae.evaluation.evaluate import encode, sampled_bce, to_tensor
    from mnist_vae.evaluation.likelihood import importance_nll, quadrature_nll

    vae, x_test = load_model(TRAINED).vae, dataset().x_test
    step = parameters().evaluate.quadrature_step
    run = {
        "elbo": lambda x: sampled_bce(vae, to_tensor(x), encode(vae, x), effort, seed=1),
        "importance": lambda x: importance_nll(vae, to_tensor(x), effort),
        "quadrature": lambda x: quadrature_nll(vae, to_tensor(x), step),
    }[estimator]
    run(x_test[:100])  # warm-up
    x = repeated(x_test, images)
    started = time.perf_counter()
    run(x)
    return {"seconds": time.perf_counter() - started, "data_bytes": x.nbytes}


def stage(name: str, clone: str) -> dict[str, Any]:
    """The seconds of one stage of ``clone``, a folder, by account: imports, tracking, compute."""
    accounts = Accounts()
    accounts.book_imports()
    os.chdir(clone)
    sys.path.insert(0, clone)  # its stages and, by them, its library
    from stages import WORKSPACE, tracker

    accounts.book_calls("tracking", tracker, ["start", "settle", "_beside"])
    accounts.book_calls("tracking", Future, ["result"])
    if name != "download":  # as in stages/__main__.py
        tracker.start(WORKSPACE)
    module = importlib.import_module(f"stages.{name}")
    source = Path(inspect.getfile(module))
    if not source.is_relative_to(clone):
        raise RuntimeError(f"{source} is not that of {clone}")
    module.main()
    tracker.settle()
    return {"imports": 0.0, "tracking": 0.0, "compute": 0.0, **accounts.close()}


def gpu() -> dict[str, Any]:
    """Name of the GPU, None without one, and the floating-point operations per second of a large matrix product."""
    import torch

    if not torch.cuda.is_available():
        return {"name": None, "torch": torch.__version__}
    side, repetitions = 8_192, 20
    a, b = torch.randn(2, side, side, device="cuda")
    a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repetitions):
        a @ b
    torch.cuda.synchronize()
    return {
        "name": torch.cuda.get_device_name(),
        "flops": repetitions * 2 * side**3 / (time.perf_counter() - started),
    }


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task for task in (prepare, bare, notebook, whole_notebook, pipeline, evaluate, stage, gpu)
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

    return load_dataset(DATASET, "mnist")


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
        if "notebook" in task:
            import torch

            torch.set_num_threads(threads)
        elif task != "stage":  # which sets its own, and whose imports are measured
            from mnist_vae.model.cpu import set_up_cpu

            set_up_cpu(threads)
        result = TASKS[task](**arguments)
    print(json.dumps({**result, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
