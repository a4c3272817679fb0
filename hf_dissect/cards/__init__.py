"""Model cards, which carry the terms of training of a model wherever it is copied to."""
