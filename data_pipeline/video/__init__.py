"""Decoding, encoding and measuring of video."""
