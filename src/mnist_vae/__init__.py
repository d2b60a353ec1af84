"""A variational autoencoder on MNIST: data, model, training, evaluation, pictures and tracking.

The library is pure: functions take what they need and return what they made. Paths, parameters and the
orchestrator belong to ``stages/``.
"""
