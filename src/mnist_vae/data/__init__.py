"""Which images: the set itself, and its binarised form."""
