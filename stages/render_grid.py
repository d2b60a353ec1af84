"""render_grid: how does the latent space hang together?   model, codes, grid.* → plots/grid.png, plots/explorer.html"""

from mnist_vae.files import write_text
from mnist_vae.model.cpu import set_up_cpu
from mnist_vae.model.latent import manifold, tile, to_uint8
from mnist_vae.model.model_file import load_model
from mnist_vae.params import load_params
from mnist_vae.pictures import figures
from mnist_vae.pictures.explorer import explorer_html
from mnist_vae.tracking.session import Session
from stages.artifacts import MODEL, PARAMS, PLOTS, read_codes
from stages.key import stage_key


def main(session: Session) -> None:
    params = load_params(PARAMS)
    recorded = params.flat("grid")
    set_up_cpu(1)
    vae, dataset, kld_per_dim, fingerprint = load_model(MODEL)
    name = f"grid: {params.grid.size} × {params.grid.size}"
    session.begin(fingerprint, stage_key("render_grid", recorded), name, recorded)

    grid = manifold(vae, params.grid.size, params.grid.quantiles, kld_per_dim)
    figures.save_png(PLOTS / "grid.png", figures.manifold_figure(grid, dataset))
    codes = read_codes(vae.config.latent_dim)
    digits = codes.get("digit")  # None where nobody has labelled the images
    page = explorer_html(vae, codes.filter(like="z"), digits, dataset=dataset, kld_per_dimension=kld_per_dim)
    write_text(PLOTS / "explorer.html", page)

    session.describe(
        f"VAE of {dataset} with {vae.config.latent_dim} latent dimensions",
        to_uint8(tile(grid.images, len(grid.across))),
    )
    session.log_file(PLOTS / "grid.png")
    session.log_file(PLOTS / "explorer.html")
