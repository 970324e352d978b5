"""Propagation of class scores over an image: random walk, pixel-adaptive refinement."""
