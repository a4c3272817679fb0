"""Reports of a run while it trains: alerts, and the pairs that it keeps and drops, for trackers and for the log."""
