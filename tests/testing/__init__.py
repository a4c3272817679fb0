"""Tiny models and data, servers on this machine and launched scripts that tests share."""

from testing.peers import mend_torchvision

mend_torchvision()  # before anything of transformers looks for it
