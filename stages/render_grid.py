"""render_grid: how does the latent space hang together?   model, codes, grid.* → plots/grid.png, plots/explorer.html"""

import pandas as pd

from mnist_vae import figures
from mnist_vae.checkpoint import load_checkpoint
from mnist_vae.cpu import set_up_cpu
from mnist_vae.errors import UserError
from mnist_vae.explorer import explorer_html
from mnist_vae.files import replacing
from mnist_vae.generation import quantile_grid
from mnist_vae.params import load_params
from stages import WORKSPACE, tracker
from stages.artifacts import MODEL, PARAMS, PLOTS, read_run_id


def main() -> None:
    params = load_params(PARAMS)
    set_up_cpu(1)
    vae, dataset, kld_per_dim = load_checkpoint(MODEL)

    grid = quantile_grid(vae, params.grid.size, params.grid.quantiles, kld_per_dim)
    figures.save_png(PLOTS / "grid.png", figures.grid_figure(grid, dataset))
    codes = read_codes()
    page = explorer_html(vae, codes.filter(like="z"), codes["digit"], dataset=dataset, kld_per_dimension=kld_per_dim)
    with replacing(PLOTS / "explorer.html") as scratch:
        scratch.write_text(page, encoding="utf-8")

    run = tracker.resume_run(WORKSPACE, read_run_id())
    run.log_params(params.flat("grid"))
    run.describe(
        f"VAE of {dataset} with {vae.architecture.latent_dim} latent dimensions",
        figures.to_uint8(figures.tile(grid.images, len(grid.across))),
    )
    run.log_file(PLOTS / "grid.png")
    run.log_file(PLOTS / "explorer.html")


def read_codes() -> pd.DataFrame:
    """The posterior means of the test images: columns digit, z0, z1, …"""
    try:
        return pd.read_csv(PLOTS / "latents.csv", dtype={"digit": "uint8"})
    except (OSError, ValueError) as error:
        raise UserError(f"{PLOTS}/latents.csv is missing or damaged; `dvc repro evaluate` makes it again") from error
