"""The generated sample sets."""
