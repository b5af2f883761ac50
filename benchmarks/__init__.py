"""Benchmarks: what each bar claims, measured here, with machine and spread. `python -m benchmarks`."""
