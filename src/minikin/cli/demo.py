"""minikin demo: placeholder until the examples are in."""
