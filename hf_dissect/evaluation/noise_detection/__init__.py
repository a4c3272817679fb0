"""Folder of the `evaluate` module `noise_detection`, a package only so that it is installed."""
