"""Makes `python -m hf_dissect.cli` do the same as the command `hf-dissect`."""

import sys

from hf_dissect.cli import main

sys.exit(main())
