"""render_samples: what does the prior look like?   model, samples.* → plots/samples.png"""

from mnist_vae.model.cpu import set_up_cpu
from mnist_vae.model.latent import decode, prior_draws
from mnist_vae.model.model_file import load_model
from mnist_vae.params import load_params
from mnist_vae.pictures import figures
from mnist_vae.tracking.session import Session
from stages.artifacts import MODEL, PARAMS, PLOTS
from stages.key import stage_key


def main(session: Session) -> None:
    params = load_params(PARAMS)
    samples, recorded = params.samples, params.flat("samples")
    set_up_cpu(1)
    model = load_model(MODEL)
    name = f"samples: {samples.rows} × {samples.cols}, seed {samples.seed}"
    session.begin(model.fingerprint, stage_key("render_samples", recorded), name, recorded)

    z = prior_draws(samples.rows * samples.cols, model.vae.config.latent_dim, samples.seed)
    figure = figures.samples_figure(decode(model.vae, z), samples.cols, model.dataset)
    figures.save_png(PLOTS / "samples.png", figure)

    session.log_file(PLOTS / "samples.png")
