"""A sweep over cores or machines: each point of a grid, or of Optuna's choice, as a DVC experiment, run by Dask.

    python -m sweep -S model.latent_dim=2,5,10,20 -S train.seed=1,2,3

space.py names the points, driver.py hands them to Dask, slot.py is what a Dask worker does with one, experiment.py
runs in that worker's clone. What is done is what git has: an experiment's reference is pushed last of all.
"""
