"""Scores: masks, maps, objects, boxes."""
