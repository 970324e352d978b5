"""Kills and hostile files for ``scripts/torture.py``: what is done to the product, and how its answer is judged."""
