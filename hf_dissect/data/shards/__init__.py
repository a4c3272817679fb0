"""WebDataset tar shards as rows of pairs: nothing is left out in silence."""
