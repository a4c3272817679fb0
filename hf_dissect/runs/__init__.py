"""The verbs of the command line, as functions: one module each."""
