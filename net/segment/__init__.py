"""Segmentation networks trained on pseudo masks: one file a network."""
