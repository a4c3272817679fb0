"""Commands of `hf-dissect`, one a module with `add_parser(subparsers)`."""
