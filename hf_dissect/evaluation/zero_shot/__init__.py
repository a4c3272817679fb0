"""Folder of the `evaluate` module `zero_shot`, a package only so that it is installed."""
