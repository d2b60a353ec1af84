"""evaluate: how good is it on the test set?   data, model, evaluate.* → metrics/evaluate.json, report.md, plots/…"""

import hashlib

import numpy as np
import pandas as pd
import torch

from mnist_vae import figures
from mnist_vae.binarization import binarized, column
from mnist_vae.checkpoint import load_checkpoint
from mnist_vae.codes import active_units
from mnist_vae.cpu import set_up_cpu
from mnist_vae.data import Dataset
from mnist_vae.evaluation import Evaluation, evaluate
from mnist_vae.files import replacing, write_json
from mnist_vae.generation import decode, leading_dimensions, traverse
from mnist_vae.params import Params, load_params
from mnist_vae.provenance import git_state
from mnist_vae.report import model_card
from mnist_vae.vae import VAE
from stages import HERE, WORKSPACE, tracker
from stages.artifacts import METRICS, MODEL, PARAMS, PLOTS, read_dataset, read_run_id

RECONSTRUCTIONS = 18  # test images shown, evenly spread from the best to the worst
ELLIPSES = 30  # posteriors drawn in full
TRAVERSAL = np.linspace(-3, 3, 13)  # standard deviations of the prior
FILES = [
    METRICS / "evaluate.json",
    METRICS / "report.md",
    *(PLOTS / name for name in ("latents.csv", "latents.png", "nll.png", "reconstructions.png", "traversal.png")),
]


def main() -> None:
    params = load_params(PARAMS)
    set_up_cpu(params.train.threads)
    kind = params.data.binarize
    dataset = binarized(read_dataset(), kind, params.data.binarize_seed)
    vae, _, kld_per_dim = load_checkpoint(MODEL)
    run = tracker.resume_run(WORKSPACE, read_run_id())
    tracker.expect_models()

    evaluation = evaluate(vae, dataset, params.evaluate, params.train.kl_weight)
    metrics = {column(name, kind): value for name, value in evaluation.metrics.items()}

    test_sha256 = dataset.about()["sha256"]["x_test"]
    about = {"dataset": dataset.name, "binarize": kind, "images": len(dataset.x_test), "test_sha256": test_sha256}
    write_json(METRICS / "evaluate.json", {**about, **metrics})
    with replacing(METRICS / "report.md") as scratch:
        scratch.write_text(card(params, dataset, vae, evaluation), encoding="utf-8")
    run.log_params(params.flat("evaluate"))
    run.log_metrics({f"test_{name}": value for name, value in metrics.items()})
    champion = tracker.register_models(WORKSPACE, MODEL, about, evaluation.metrics["nll"])
    draw(dataset, vae, evaluation, kld_per_dim)
    for path in FILES:
        run.log_file(path)

    print(f"{dataset.title}, {len(dataset.x_test):,} test images, nats/image: ", end="")
    print("elbo {elbo:.2f} ± {elbo_se:.2f}, nll {nll:.2f} ± {nll_se:.2f}, kld {kld:.2f}".format(**evaluation.metrics))
    if champion.result():
        print("champion: `mlflow models serve -m models:/mnist-vae-decoder@champion` answers with this model")


def card(params: Params, dataset: Dataset, vae: VAE, evaluation: Evaluation) -> str:
    """The model card; it names neither the run nor the time, so equal results are equal bytes."""
    architecture, git, about = vae.architecture, git_state(HERE), dataset.about()
    sizes = [architecture.input_dim, architecture.hidden_dim, architecture.latent_dim]
    facts = {
        "data": f"{dataset.title}: {about['train_images']:,} training and {about['test_images']:,} test images",
        "data, SHA-256": about["digest"],
        "model": "-".join(map(str, [*sizes, *sizes[-2::-1]])),
        "weights": f"{sum(weights.numel() for weights in vae.parameters()):,}",
        "model file, MD5": hashlib.md5(MODEL.read_bytes(), usedforsecurity=False).hexdigest(),
        "code, git commit": git["git_commit"] + (" with changes" if git["git_dirty"] == "true" else ""),
        "torch": torch.__version__,
    }
    parameters = params.flat("data", "model", "train", "evaluate")
    return model_card(dataset.title, dataset.pixels, facts, evaluation.metrics, parameters)


def draw(dataset: Dataset, vae: VAE, evaluation: Evaluation, kld_per_dim: list[float]) -> None:
    """The pictures of the test set, and its codes as a table."""
    means = evaluation.posterior.mean.numpy()
    codes = pd.DataFrame(means, columns=[f"z{dim}" for dim in range(means.shape[1])])
    codes.insert(0, "digit", dataset.y_test)
    with replacing(PLOTS / "latents.csv") as scratch:
        codes.to_csv(scratch, index=False, float_format="%.5f")

    ellipses = np.random.default_rng(0).choice(len(means), min(ELLIPSES, len(means)), replace=False)
    leading = leading_dimensions(kld_per_dim)
    figures.save_png(
        PLOTS / "latents.png",
        figures.latents_figure(evaluation.posterior, dataset.y_test, leading, ellipses, dataset.title),
    )
    figures.save_png(PLOTS / "nll.png", figures.nll_figure(evaluation.nll, dataset.y_test, dataset.title))

    spread = np.linspace(0, len(means) - 1, min(RECONSTRUCTIONS, len(means))).round().astype(int)
    shown = np.argsort(evaluation.bce, kind="stable")[spread]
    reconstructions = decode(vae, evaluation.posterior.mean[shown])
    figures.save_png(
        PLOTS / "reconstructions.png",
        figures.reconstructions_figure(
            dataset.x_test[shown] / 255, reconstructions, evaluation.bce[shown], dataset.title
        ),
    )

    by_information = np.argsort(kld_per_dim, kind="stable")[::-1]
    active = [int(dim) for dim in by_information if active_units(means)[dim]] or [int(by_information[0])]
    figures.save_png(
        PLOTS / "traversal.png",
        figures.traversal_figure(traverse(vae, active, TRAVERSAL), TRAVERSAL, active, dataset.title),
    )
