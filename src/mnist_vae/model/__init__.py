"""The VAE, its file, and the ways into and out of its latent space."""
