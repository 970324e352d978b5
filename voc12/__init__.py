"""The data: which images, tags and masks there are, and how a batch is made of them."""
