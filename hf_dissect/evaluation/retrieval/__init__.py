"""Folder of the `evaluate` module `retrieval`, a package only so that it is installed."""
