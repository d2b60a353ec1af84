"""Where images come from: MNIST over the network or from a folder, and digits that need neither."""
