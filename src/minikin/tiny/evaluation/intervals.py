"""The intervals of `minikin.judging.intervals`, by the name that tiny's evaluation knows them by."""

from minikin.judging.intervals import RESAMPLES, Measured, Z, mean, share

__all__ = ["RESAMPLES", "Measured", "Z", "mean", "share"]
