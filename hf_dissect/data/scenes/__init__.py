"""Drawn scenes with captions: data for tests and the quickstart that need no download."""
