"""Synthetic videos for tests and benchmarks."""
