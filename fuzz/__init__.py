"""Fuzz targets: what reads bytes or texts of strangers. `python -m fuzz` runs them; see docs/robustness.md."""
