"""How the benchmarks tell what they measured."""

import json
from pathlib import Path


def show_and_write(results: dict, output: Path | None) -> None:
    """Print the results as JSON, and write them to a file where one is named."""
    text = json.dumps(results, indent=2)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
