"""What a run reports while it trains: alerts, and the pairs that it keeps and drops, to trackers and to the log."""
