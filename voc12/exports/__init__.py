"""Formats of annotation tools and of other data sets (voc12/export.py says what each file has to have)."""
