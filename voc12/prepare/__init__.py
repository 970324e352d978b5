"""Checks of data sets and converters into their layout."""
