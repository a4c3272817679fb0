"""Runs the command with FSDP2 on a machine without GPUs, which torch can do (gloo), but accelerate never chooses."""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda self, *arguments, **keywords: ("gloo", DistributedType.MULTI_GPU)

from hf_dissect.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
