"""evaluate: how good is it on the test set?   data, model, evaluate.* → metrics/evaluate.json, plots/…"""

import numpy as np
import pandas as pd
import torch

from mnist_vae import figures, tracking
from mnist_vae.checkpoint import load_checkpoint
from mnist_vae.evaluation import encode, measure_elbo
from mnist_vae.files import replacing, write_json
from mnist_vae.generation import decode, leading_dimensions
from mnist_vae.params import load_params
from stages import WORKSPACE
from stages.artifacts import METRICS, MODEL, PARAMS, PLOTS, read_dataset, read_run_id
from stages.stage import run_stage

RECONSTRUCTIONS = 18  # test images shown, evenly spread from the best to the worst


def main() -> None:
    params = load_params(PARAMS)
    torch.set_num_threads(params.train.threads)
    dataset = read_dataset()
    vae, _, kld_per_dim = load_checkpoint(MODEL)

    elbo = measure_elbo(vae, dataset.x_test, params.evaluate)
    posterior = encode(vae, dataset.x_test)
    metrics = elbo.summary(params.train.kl_weight)

    write_json(METRICS / "evaluate.json", {"dataset": dataset.name, "images": len(dataset.x_test), **metrics})
    means = posterior.mean.numpy()
    codes = pd.DataFrame(means, columns=[f"z{dim}" for dim in range(means.shape[1])])
    codes.insert(0, "digit", dataset.y_test)
    with replacing(PLOTS / "latents.csv") as scratch:
        codes.to_csv(scratch, index=False, float_format="%.5f")
    dimensions = leading_dimensions(kld_per_dim)
    figures.save_png(PLOTS / "latents.png", figures.latents_figure(means, dataset.y_test, dimensions, dataset.title))
    nats = elbo.bce.mean(axis=0)  # (N,)
    shown = np.argsort(nats, kind="stable")[np.linspace(0, len(nats) - 1, RECONSTRUCTIONS).round().astype(int)]
    figures.save_png(
        PLOTS / "reconstructions.png",
        figures.reconstructions_figure(
            dataset.x_test[shown] / 255, decode(vae, posterior.mean[shown]), nats[shown], dataset.title
        ),
    )

    run = tracking.resume_run(WORKSPACE, read_run_id())
    run.log_params(params.flat("evaluate"))
    run.log_metrics({f"test_{name}": value for name, value in metrics.items()})
    for path in (
        METRICS / "evaluate.json",
        *(PLOTS / name for name in ("latents.csv", "latents.png", "reconstructions.png")),
    ):
        run.log_file(path)
    print(f"{dataset.title}, {len(dataset.x_test):,} test images: ", end="")
    print("loss {loss:.2f} ± {loss_se:.2f}, bce {bce:.2f}, kld {kld:.2f} nats/image".format(**metrics))


if __name__ == "__main__":
    run_stage(main)
