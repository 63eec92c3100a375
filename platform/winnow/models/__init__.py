"""Models: from a reference in winnow.toml to exact weights, and from weights to probabilities."""
