"""Pairs that are read while training, in an order that can be resumed exactly."""
