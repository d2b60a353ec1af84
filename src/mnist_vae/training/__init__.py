"""Training: the LightningModule, its data, its callbacks, and the checkpoints that it resumes from."""

from mnist_vae.compat import cure_torchvision

cure_torchvision()  # before any file of this room imports lightning
