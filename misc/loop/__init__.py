"""The two loops: fit trains a network, each runs a function over images."""
