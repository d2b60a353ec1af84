"""python -m tests.distributed.cases PROCESSES IMAGES FOLDER: fit every case; each process writes what it got."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from mnist_vae.compat import cure_torchvision

cure_torchvision()

import lightning as L  # noqa: E402  after the cure
import numpy as np  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.plugins.precision import Precision  # noqa: E402
from torch import nn  # noqa: E402

from mnist_vae.training import data_module  # noqa: E402
from mnist_vae.training import fit as fitting  # noqa: E402
from mnist_vae.training.processes import processes  # noqa: E402
from mnist_vae.training.strategies import IS_POSSIBLE, SharedMemoryStrategy  # noqa: E402
from tests.training import CONFIG, Recorder, settings, weights  # noqa: E402

CASES: dict[str, dict[str, Any]] = {  # for 100 images
    "last mini-batch of 4": {"epochs": 3},
    "last mini-batch of one image": {"epochs": 2, "batch_size": 33},
    "pixels drawn": {"epochs": 2, "redraw_seed": 5},
    "several draws of z": {"epochs": 2, "importance_samples": 3},
    "stopped early": {"epochs": 5, "patience": 1, "min_delta": 1e6},
    "held out": {"epochs": 5, "learning_rate": 0.1, "validation_size": 31},
    "all at once": {
        "epochs": 5,
        "batch_size": 23,
        "kl_warmup": 0.3,
        "importance_samples": 3,
        "schedule": "one_cycle",
        "redraw_seed": 5,
        "validation_size": 31,
        "patience": 1,
        "min_delta": 1e6,
        "eps": 1.0,
    },
    "resumed twice, and once when it was over": {"epochs": [1, 2, 3, 3]},
    "by DDP": {"epochs": 2, "eps": 1.0},
    "layers in bfloat16": {"epochs": 2, "precision": "bf16-mixed"},
    "beyond the window, from a file": {"epochs": 2, "shuffle_window": 32, "validation_size": 31},
}
IN_MEMORY = data_module.IN_MEMORY


class Seen(L.Callback):
    """Keeps the name of the strategy that Lightning trains with."""

    strategy = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy = type(trainer.strategy).__name__


STEPS = 10
SIZES = [3, 2, 1]  # of weights


class SlowPrecision(Precision):
    """Changes weights late."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(self.seconds)
        return optimizer.step()


def sums(rank: int) -> dict[str, Any]:
    """What sums of the numbers rank² come to, fewer and more of them than there are weights.

    Then, what a process has after each step down the gradients rank², rank² + 1, …, and which of them are its own; what
    the processes decide together where one, none and all of them say yes; and when they meet. The later ones are slow.
    """
    seconds = 0.02 * rank
    module = L.LightningModule()
    module.weights = nn.ParameterList([torch.zeros(size) for size in SIZES])
    strategy = SharedMemoryStrategy(precision_plugin=SlowPrecision(seconds))
    strategy.connect(module)
    strategy.configure_ddp()
    optimizer, wait, weights_seen = torch.optim.SGD(module.parameters(), lr=1), strategy._wait_for_all, []

    def wait_and_be_slow() -> None:
        wait()
        time.sleep(seconds)

    strategy._wait_for_all = wait_and_be_slow
    fewer, more = (torch.full((2, half), float(rank**2)) for half in (1, sum(SIZES)))
    totals = [strategy.reduce(numbers, reduce_op="sum") for numbers in (fewer, fewer + 1, more)]
    for step in range(STEPS):
        for weight in module.weights:
            weight.grad = torch.full_like(weight, float(rank**2 + step))
        strategy.post_backward(torch.zeros(()))
        strategy.optimizer_step(optimizer, lambda: None)
        weights_seen.append([weight.tolist() for weight in module.weights])
    own = [number for number, weight in enumerate(module.weights) if weight.grad is not None]
    answers = [rank == 0, False, True]
    decisions = [[strategy.reduce_boolean_decision(answer, all=every) for answer in answers] for every in (False, True)]
    arrived = time.monotonic()
    strategy._wait_for_all = wait
    strategy.barrier()
    return {
        "weights": weights_seen,
        "own": own,
        "sums": [total.tolist() for total in totals],
        "decisions": decisions,
        "met": [arrived, time.monotonic()],  # Linux: one clock for all processes
    }


def main(count: int, images: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    data_module.CHUNK = 2  # several chunks in an epoch
    data_module.SHUFFLE_BLOCK = 8
    command = [sys.executable, "-m", "tests.distributed.cases", *sys.argv[1:]]
    with processes(settings(devices=count), command) as group:
        group.join({})
        if count > 1 and IS_POSSIBLE:
            (folder / f"sums, {group.place.rank}.json").write_text(json.dumps(sums(group.place.rank)))
        for name, case in CASES.items():
            changes = dict(case)
            redraw_seed, logger = changes.pop("redraw_seed", None), Recorder()
            epochs = changes.pop("epochs")
            data_module.IN_MEMORY = 0 if "shuffle_window" in case else IN_MEMORY
            fitting.IS_POSSIBLE = IS_POSSIBLE and name != "by DDP"
            first = group.place.rank == 0
            seen = Seen()
            for until in epochs if isinstance(epochs, list) else [epochs]:
                trained = fitting.fit(
                    np.load(images),
                    CONFIG,
                    settings(**changes, epochs=until, devices=count),
                    redraw_seed=redraw_seed,
                    logger=logger if first else None,
                    callbacks=[seen],
                    checkpoints=folder / "checkpoints" if isinstance(epochs, list) else None,
                )
            result = {
                "strategy": seen.strategy,
                "history": trained.history,
                "best_epoch": trained.best_epoch,
                "logged": logger.records,
                "weights": weights(trained.vae).tolist(),
                "is_shared": any(weight.is_shared() for weight in trained.vae.parameters()),
            }
            (folder / f"{name}, {group.place.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
