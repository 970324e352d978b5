"""Names of the curves in TensorBoard besides the loss terms: NAME/TERM, where NAME is the training. Writing them needs
PyTorch, reading them does not."""

LEARNING_RATE = "lr"
IMAGES_PER_SECOND = "images_per_second"
RATING = "rating/"
"""Beginning of the terms of ratings, by which epochs are selected."""
