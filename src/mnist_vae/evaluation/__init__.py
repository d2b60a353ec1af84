"""How good a model is: every number, and the card that explains them."""
