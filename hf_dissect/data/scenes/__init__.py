"""Drawn scenes with captions, as data for tests and the quickstart without a download."""
