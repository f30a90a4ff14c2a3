"""Benchmarks: a data set, any explainer, and the metrics."""
