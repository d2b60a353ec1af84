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
from torch import nn  # noqa: E402

from mnist_vae.training import data_module  # noqa: E402
from mnist_vae.training.fit import fit  # noqa: E402
from mnist_vae.training.processes import processes  # noqa: E402
from mnist_vae.training.shared_memory import IS_POSSIBLE, SharedMemoryStrategy  # noqa: E402
from tests.training import CONFIG, Recorder, settings, weights  # noqa: E402

CASES: dict[str, dict[str, Any]] = {  # for 100 images
    "last mini-batch of 4": {"epochs": 3},
    "last mini-batch of one image": {"epochs": 2, "batch_size": 33},
    "pixels drawn": {"epochs": 2, "redraw_seed": 5},
    "several draws of z": {"epochs": 2, "importance_samples": 3},
    "stopped early": {"epochs": 5, "patience": 1, "min_delta": 1e6},
    "held out": {"epochs": 3, "learning_rate": 0.1, "validation_size": 31},
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
    },
    "layers in bfloat16": {"epochs": 2, "precision": "bf16-mixed"},
    "beyond the window, from a file": {"epochs": 2, "shuffle_window": 32, "validation_size": 31},
}
IN_MEMORY = data_module.IN_MEMORY


class Seen(L.Callback):
    """Keeps the name of the strategy that Lightning trains with."""

    strategy = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy = type(trainer.strategy).__name__


MEANS = 10  # mini-batches


def means(rank: int) -> dict[str, Any]:
    """What a process gets for its gradients rank², rank² + 1, …, where the later ones read more slowly.

    And for sums of such numbers, fewer and more of them than there are gradients.
    """
    module = L.LightningModule()
    module.weight = nn.Parameter(torch.zeros(3))
    strategy = SharedMemoryStrategy()
    strategy.connect(module)
    strategy.configure_ddp()
    wait, got = strategy._wait_for_all, []

    def wait_and_be_slow() -> None:
        wait()
        time.sleep(0.02 * rank)

    strategy._wait_for_all = wait_and_be_slow
    for step in range(MEANS):
        module.weight.grad = torch.full((3,), float(rank**2 + step))
        strategy.post_backward(torch.zeros(()))
        got.append(float(module.weight.grad.unique()))
    fewer, more = (torch.full((2, half), float(rank**2)) for half in (1, 2))
    sums = [strategy.reduce(numbers, reduce_op="sum") for numbers in (fewer, more, fewer)]
    return {"means": got, "sums": [total.tolist() for total in sums]}


def main(count: int, images: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    data_module.CHUNK = 2  # several chunks in an epoch
    data_module.SHUFFLE_BLOCK = 8
    command = [sys.executable, "-m", "tests.distributed.cases", *sys.argv[1:]]
    with processes(settings(devices=count), command) as group:
        group.join({})
        if count > 1 and IS_POSSIBLE:
            (folder / f"means, {group.place.rank}.json").write_text(json.dumps(means(group.place.rank)))
        for name, case in CASES.items():
            changes = dict(case)
            redraw_seed, logger = changes.pop("redraw_seed", None), Recorder()
            chosen = settings(**changes, devices=count)
            data_module.IN_MEMORY = 0 if "shuffle_window" in case else IN_MEMORY
            first = group.place.rank == 0
            seen = Seen()
            trained = fit(
                np.load(images),
                CONFIG,
                chosen,
                redraw_seed=redraw_seed,
                logger=logger if first else None,
                callbacks=[seen],
            )
            result = {
                "strategy": seen.strategy,
                "history": trained.history,
                "best_epoch": trained.best_epoch,
                "logged": logger.records,
                "weights": weights(trained.vae).tolist(),
            }
            (folder / f"{name}, {group.place.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
