"""Parts that all kinds of runs share: checkpoints, resuming, interruption, run folder and card."""
