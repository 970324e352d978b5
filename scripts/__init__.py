"""Studies, benchmarks and measurements: `python -m scripts.NAME` from the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
