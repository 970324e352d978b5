"""Segmentation networks trained on pseudo masks: one file per network."""
