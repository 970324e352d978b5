"""Images, CAMs and masks of one image as arrays: normalisation, resizing, drawing."""
