"""Verbs of the command line as functions, one module each."""
