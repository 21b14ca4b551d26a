"""Several runs from one file: what they are, where they stand, and running them."""
