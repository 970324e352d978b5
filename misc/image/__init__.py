"""Images as arrays: pixel values, drawing."""
