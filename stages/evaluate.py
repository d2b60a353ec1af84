"""evaluate: how good is it on the test set?   data, model, evaluate.* → metrics/evaluate.json, report.md, plots/…"""

import hashlib

import numpy as np
import pandas as pd
import torch

from mnist_vae.data.binarization import binarize_dataset, metric_name
from mnist_vae.data.dataset import Dataset, hold_out, load_dataset
from mnist_vae.evaluation.codes import active_units
from mnist_vae.evaluation.evaluate import Evaluation, Metrics, evaluate
from mnist_vae.evaluation.model_card import COLLAPSED, NO_LABELS, group, is_detail, model_card
from mnist_vae.files import atomic_write, write_json, write_text
from mnist_vae.model.cpu import set_up_cpu
from mnist_vae.model.latent import decode, leading_dimensions, traverse
from mnist_vae.model.model_file import SavedModel, load_model
from mnist_vae.params import Params, load_params
from mnist_vae.pictures import figures
from mnist_vae.tracking.session import Session
from stages.artifacts import CODES, DATASET, METRICS, MODEL, PARAMS, PLOTS, read_losses
from stages.key import stage_key

RECONSTRUCTIONS = 18  # test images shown, evenly spread from the best to the worst
ELLIPSES = 30  # posteriors drawn in full
TRAVERSAL = np.linspace(-3, 3, 13)  # standard deviations of the prior
NLL = PLOTS / "nll.csv"
PICTURES = ("latents", "losses", "nll", "reconstructions", "traversal")


def main(session: Session) -> None:
    params = load_params(PARAMS)
    set_up_cpu(params.train.threads)
    binarize = params.data.binarize
    dataset = binarize_dataset(load_dataset(DATASET), binarize, params.data.binarize_seed)
    _, held_out = hold_out(dataset.x_train, params.train.validation_size, params.train.seed)
    model = load_model(MODEL)
    recorded = params.flat("evaluate")
    key = stage_key("evaluate", params.flat("data", "model", "train", "evaluate"))  # all that the card shows
    session.begin(model.fingerprint, key, f"evaluate: {dataset.title}", recorded)

    evaluation = evaluate(model.vae, dataset, params.evaluate, params.train.kl_weight, held_out)

    metrics = {metric_name(name, binarize): value for name, value in evaluation.metrics.items()}
    sha256 = {"test_sha256": dataset.about["sha256"]["x_test"]}
    about = {"dataset": dataset.name, "binarize": binarize, "images": len(dataset.x_test), **sha256}
    write_json(METRICS / "evaluate.json", {**about, **metrics})
    write_text(METRICS / "report.md", card(params, dataset, model, evaluation))
    draw(dataset, model, evaluation)

    charts = [name for name in evaluation.metrics if not is_detail(name)]  # all numbers are in evaluate.json
    session.log_metrics({metric_name(group(name), binarize): evaluation.metrics[name] for name in charts})
    chosen_by = "val_nll" if "val_nll" in evaluation.metrics else "nll"
    on = {"images": len(held_out), "selected_by": "validation nll"} if chosen_by == "val_nll" else {}
    session.register(MODEL, {**about, "selected_by": "test nll", **on}, float(evaluation.metrics[chosen_by]))
    pictures = [PLOTS / f"{name}.png" for name in PICTURES]
    for path in (METRICS / "evaluate.json", METRICS / "report.md", CODES, NLL, *pictures):
        session.log_file(path)

    if not evaluation.metrics["active_units"]:
        print(f"evaluate: WARNING: {COLLAPSED}")
        session.log_tags({"warning": COLLAPSED})
    if dataset.y_test is None:
        print(f"evaluate: {NO_LABELS}")
    print(f"{dataset.title}, {len(dataset.x_test):,} test images, {in_words(evaluation.metrics)}")


def in_words(metrics: Metrics) -> str:
    """The three numbers that say most: ``elbo -155.51 ± 0.01, nll 150.31 ± 0.47, kld 5.61 nats/image``."""
    text = "elbo {elbo:.2f} ± {elbo_se:.2f}, nll {nll:.2f} ± {nll_se:.2f}, kld {kld:.2f} nats/image"
    return text.format_map({name: metrics[name] for name in ("elbo", "elbo_se", "nll", "nll_se", "kld")})


def card(params: Params, dataset: Dataset, model: SavedModel, evaluation: Evaluation) -> str:
    """The model card; it names neither the run nor the time, so equal results are equal bytes."""
    config, about = model.vae.config, dataset.about
    sizes = [config.input_dim, *config.hidden_dims, config.latent_dim]
    facts = {
        "data": f"{dataset.title}: {about['train_images']:,} training and {about['test_images']:,} test images",
        "data, SHA-256": about["digest"],
        "model": f"{'-'.join(map(str, [*sizes, *sizes[-2::-1]]))}, {config.activation}",
        "weights": f"{sum(weights.numel() for weights in model.vae.parameters()):,}",
        "model file, MD5": hashlib.md5(MODEL.read_bytes(), usedforsecurity=False).hexdigest(),
        "fingerprint of the training": model.fingerprint,
        "torch": torch.__version__,
    }
    parameters = params.flat("data", "model", "train", "evaluate")
    return model_card(dataset.title, dataset.binarize, facts, evaluation.metrics, parameters)


def draw(dataset: Dataset, model: SavedModel, evaluation: Evaluation) -> None:
    """The pictures of training and of the test set, with its codes and its likelihoods as tables."""
    title, means = dataset.title, evaluation.posterior.mean.numpy()
    table = read_losses().drop(columns="binarize")
    losses = {str(name): column.tolist() for name, column in table.items()}
    figures.save_png(PLOTS / "losses.png", figures.losses_figure(losses, model.dataset))

    codes = pd.DataFrame(means, columns=[f"z{dim}" for dim in range(means.shape[1])])
    nll = pd.DataFrame({"nll": evaluation.nll})
    for path, columns in ((CODES, codes), (NLL, nll)):
        if dataset.y_test is not None:
            columns.insert(0, "digit", dataset.y_test)
        with atomic_write(path) as scratch:
            columns.to_csv(scratch, index=False, float_format="%.5f")

    ellipses = np.random.default_rng(0).choice(len(means), min(ELLIPSES, len(means)), replace=False)
    plane = leading_dimensions(model.kld_per_dim)
    latents = figures.latents_figure(evaluation.posterior, dataset.y_test, plane, ellipses, title)
    figures.save_png(PLOTS / "latents.png", latents)
    figures.save_png(PLOTS / "nll.png", figures.nll_figure(evaluation.nll, dataset.y_test, title))

    spread = np.linspace(0, len(means) - 1, min(RECONSTRUCTIONS, len(means))).round().astype(int)
    shown = np.argsort(evaluation.bce, kind="stable")[spread]
    pairs = (dataset.x_test[shown] / 255, decode(model.vae, evaluation.posterior.mean[shown]))
    figures.save_png(
        PLOTS / "reconstructions.png", figures.reconstructions_figure(*pairs, evaluation.bce[shown], title)
    )

    by_information, is_active = np.argsort(model.kld_per_dim, kind="stable")[::-1], active_units(means)
    active = [int(dim) for dim in by_information if is_active[dim]] or [int(by_information[0])]
    walk = traverse(model.vae, active, TRAVERSAL)
    figures.save_png(PLOTS / "traversal.png", figures.traversal_figure(walk, TRAVERSAL, active, title))
