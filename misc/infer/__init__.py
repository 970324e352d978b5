"""Multi-scale inference of class maps and masks."""
