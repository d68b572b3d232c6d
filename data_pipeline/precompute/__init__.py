"""Columns computed from raw shards: `landiff precompute`."""
