"""Evaluation of masks, maps, objects and boxes."""
