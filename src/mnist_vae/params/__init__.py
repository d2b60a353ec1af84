"""params.yaml as typed, checked parameters: the sections, reading them, and the memory that they ask for."""

from mnist_vae.params.reading import load_params
from mnist_vae.params.sections import NAMES, Data, Evaluate, Grid, Model, Params, Samples, Section, Train

__all__ = ["NAMES", "Data", "Evaluate", "Grid", "Model", "Params", "Samples", "Section", "Train", "load_params"]
