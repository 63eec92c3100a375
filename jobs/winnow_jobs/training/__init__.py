"""Whole networks trained on the cluster: Ray Train runs the workers, Ray Data reads, decodes and augments."""
