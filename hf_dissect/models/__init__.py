"""Dual encoders: how they are loaded, built from scratch, adapted, joined and told apart."""
