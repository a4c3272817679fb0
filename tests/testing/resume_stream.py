"""Run by test_resume.py in a process of its own: the batches after a saved place, into a file."""

import itertools
import json
import sys
from pathlib import Path

import torch

from testing.tiny_streams import real_loader

torch.set_num_threads(1)

if __name__ == "__main__":
    state, count, out = sys.argv[1:]
    loader = real_loader()
    loader.load_state_dict(json.loads(Path(state).read_text()))
    torch.save(list(itertools.islice(loader, int(count))), out)
