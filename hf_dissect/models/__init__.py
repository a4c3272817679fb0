"""Dual encoders: loading, building from scratch, adapting, joining, and the differences between their families."""
