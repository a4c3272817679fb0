"""Pairs read while training, with an order that can be resumed exactly."""
