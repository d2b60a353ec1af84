"""render_samples: what does the prior look like?   model, samples.* → plots/samples.png"""

from mnist_vae import figures
from mnist_vae.checkpoint import load_checkpoint
from mnist_vae.cpu import set_up_cpu
from mnist_vae.generation import decode, prior_draws
from mnist_vae.params import load_params
from stages import WORKSPACE, tracker
from stages.artifacts import MODEL, PARAMS, PLOTS, read_run_id


def main() -> None:
    params = load_params(PARAMS)
    samples = params.samples
    set_up_cpu(1)
    vae, dataset, _ = load_checkpoint(MODEL)

    z = prior_draws(samples.rows * samples.cols, vae.architecture.latent_dim, samples.seed)
    figure = figures.samples_figure(decode(vae, z), samples.cols, dataset)
    figures.save_png(PLOTS / "samples.png", figure)

    run = tracker.resume_run(WORKSPACE, read_run_id())
    run.log_params(params.flat("samples"))
    run.log_file(PLOTS / "samples.png")
