"""Test-time inference of class maps and masks over scales and mirrors."""
