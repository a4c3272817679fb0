"""Tiny models and data, servers on this machine and launched scripts that tests share."""
