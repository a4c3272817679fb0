"""A page that shows a run while it trains, served from its folder on this machine alone."""
