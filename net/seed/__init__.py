"""Networks that are trained from tags and give class activation maps: one file a method."""
