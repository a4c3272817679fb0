"""Let `python -m hf_dissect.cli` do what the command `hf-dissect` does."""

import sys

from hf_dissect.cli import main

sys.exit(main())
