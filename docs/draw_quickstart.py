"""Draws the curves of a finished `make quickstart`, the picture of README.md and docs/quickstart.md."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from hf_dissect.report.data import RunSummary, replace_file
from hf_dissect.report.plots import series

ROOT = Path(__file__).parents[1]
COLORS = ("#60666d", "#d55e00", "#0072b2", "#00835f", "#cc79a7", "#56b4e9")
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: a quarter of the size
    "svg.hashsalt": "hf_dissect",  # the same runs give the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def read_runs(folder: Path) -> list[RunSummary]:
    """Return the finished runs of a comparison, plain training and the random subset first.

    Raises:
        FileNotFoundError: no run in `folder` is finished.
    """
    runs = [RunSummary.load(path) for path in folder.glob("*/report_data.json")]
    if not runs:
        raise FileNotFoundError(f"{folder} has no finished runs (*/report_data.json). Run `make quickstart` first.")
    order = ["none", "random"]
    return sorted(runs, key=lambda run: (order.index(run.name) if run.name in order else len(order), run.name))


def draw(runs: Sequence[RunSummary], path: Path) -> None:
    """Write the recall sum and the share of mismatched pairs among the kept ones to `path`, an SVG file."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8.4, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        recall, mismatched = figure.subplots(1, 2)
        for run, color in zip(runs, COLORS, strict=False):
            steps, values = series(run.log_history, r"eval_.*recall_sum")
            recall.plot(steps, values, color=color, label=run.name, marker="o", markersize=3.5)
            steps, shares = series(run.log_history, "selection_noise_kept")
            mismatched.plot(steps, [100 * share for share in shares], color=color, label=run.name)
        recall.set_title("recall sum on the validation split (of 600)", loc="left", fontsize=10)
        mismatched.set_title("mismatched pairs among the kept ones (%)", loc="left", fontsize=10)
        for axes in (recall, mismatched):
            axes.set_xlabel("optimiser step")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", linewidth=0.5, alpha=0.5)
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    replace_file(path, "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=ROOT / "runs" / "quickstart", help="folder of the run")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "quickstart.svg")
    options = parser.parse_args(arguments)
    draw(read_runs(options.run), options.output)
    print(options.output)


if __name__ == "__main__":
    main()
