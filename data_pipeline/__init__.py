"""Data pipeline: ingest of videos, precomputed columns, and loading."""
