"""The data: images, tags and masks of data sets, and training batches."""
