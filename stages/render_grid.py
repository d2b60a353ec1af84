"""render_grid: how does the latent space hang together?   model, grid.* → plots/grid.png"""

import torch

from mnist_vae import figures, tracking
from mnist_vae.checkpoint import load_checkpoint
from mnist_vae.data import TITLES
from mnist_vae.generation import quantile_grid
from mnist_vae.params import load_params
from stages import WORKSPACE
from stages.artifacts import MODEL, PARAMS, PLOTS, read_run_id
from stages.stage import run_stage


def main() -> None:
    params = load_params(PARAMS)
    torch.set_num_threads(1)
    vae, dataset, kld_per_dim = load_checkpoint(MODEL)

    grid = quantile_grid(vae, params.grid.size, params.grid.quantiles, kld_per_dim)
    figures.save_png(PLOTS / "grid.png", figures.grid_figure(grid, TITLES[dataset]))

    run = tracking.resume_run(WORKSPACE, read_run_id())
    run.log_params(params.flat("grid"))
    run.log_file(PLOTS / "grid.png")


if __name__ == "__main__":
    run_stage(main)
