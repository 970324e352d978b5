"""Networks that are trained from tags and give class activation maps: one file per method."""
