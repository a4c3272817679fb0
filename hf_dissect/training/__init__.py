"""What every run shares, whatever it trains: checkpoints, resuming, interruption, run folder and card."""
