"""Loads samples of a data set in a global order."""
