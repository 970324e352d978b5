"""One file per data set: its folder's layout, and where its tags and masks come from."""
