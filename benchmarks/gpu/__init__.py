"""Measurements on a GPU with random weights of true size: `python -m benchmarks.gpu`."""
