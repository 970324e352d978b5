"""Studies, benchmarks and measurements: `python -m scripts.NAME` from the checkout."""
