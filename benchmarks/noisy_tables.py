"""The tables of `noisy_correspondence.py`: in the terminal, in README.md, docs/which_method.md and docs/results.md."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

from noisy_methods import CONDITIONS, IN_README, IN_README_CONDITIONS, KINDS, METHODS, OPINIONS, split_condition

from hf_dissect.evaluation import format_results_table, summarise_seeds

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "method": "method",
    "last": "recall sum, last",
    "averaged": "averaged weights",
    "best": "best on validation",
    "detection": "detection",
    "model_auroc": "of the model",
    "recovered": "recovered",
    "won_back": "won back",
    "seconds": "seconds",
    "seconds_per_step": "seconds a step",
}
DECIMALS = {
    "last": 1,
    "averaged": 1,
    "best": 1,
    "detection": 3,
    "model_auroc": 3,
    "recovered": 2,
    "won_back": 2,
    "seconds": 0,
}
DECIMALS |= {"seconds_per_step": 3}
BUDGETS = {"steps": "equal steps", "time": "equal time, scoring charged"}
_BEGIN, _END = "<!-- {}: begin -->\n", "<!-- {}: end -->\n"
_FEWEST_TO_RANK = 3
SMALLEST_GAP = 10.0
"""Points of the recall sum below which no share of a gap is given: runs differ by as much."""
TWICE = ("gsc+", "gsc+-without-labels")
"""Methods that train two networks."""


def modernise(runs: list[dict]) -> list[dict]:
    """Runs of earlier versions, whose noise was a number, under the names of today."""
    named = [
        {**run, "noise": f"random{run['noise']}" if isinstance(run["noise"], int) else run["noise"]} for run in runs
    ]
    for run in named:
        run.setdefault("budget", "steps")
        run.setdefault("seconds_per_step", run["seconds"] / run["steps"])
        opinions = [run[name] for name in OPINIONS if name in run]
        run |= {"detection": opinions[0]} if opinions else {}
    return named


def is_complete(run: dict) -> bool:
    """Whether a run has all figures of today; others are measured again."""
    return "averaged" in run


def summarise(runs: list[dict], budget: str, condition: str) -> list[dict]:
    """A row per method: figures as mean and spread over the seeds."""
    of_condition = [run for run in runs if (run["budget"], run["noise"]) == (budget, condition)]
    by_seed = {(run["method"], run["seed"]): run for run in of_condition}
    same_data = split_condition(condition)[0] != "absent"  # which has fewer images
    cleans = [run for run in runs if (run["budget"], run["noise"], run["method"]) == (budget, "random0", "none")]
    clean = {run["seed"]: run for run in cleans if same_data}
    rows = []
    for method in [name for name in METHODS if any(run["method"] == name for run in of_condition)]:
        own = [run for run in of_condition if run["method"] == method]
        ends = [[by_seed.get((end, run["seed"])) for end in ("none", "oracle")] for run in own]
        shares = [
            {"recovered": (run["last"] - none["last"]) / (oracle["last"] - none["last"])}
            if none and oracle and oracle["last"] - none["last"] >= SMALLEST_GAP
            else {}
            for run, (none, oracle) in zip(own, ends, strict=True)
        ]
        won = [_win_back(run, none, clean.get(run["seed"])) for run, (none, _) in zip(own, ends, strict=True)]
        figures = summarise_seeds([run | share | back for run, share, back in zip(own, shares, won, strict=True)])
        rows.append({**figures, "method": method, "seeds": sorted(run["seed"] for run in own)})
    return rows


def _win_back(run: dict, none: dict | None, clean: dict | None) -> dict[str, float]:
    """Share of the loss of plain training to wrong captions that a method wins back, all with averaged weights."""
    if not none or not clean or "averaged" not in run or "averaged" not in none:
        return {}
    lost = clean["averaged"] - none["averaged"]
    return {"won_back": (run["averaged"] - none["averaged"]) / lost} if lost >= SMALLEST_GAP else {}


def list_tables(runs: list[dict]) -> Iterator[tuple[str, str, list[dict]]]:
    """Budget, condition and rows of each table that has any."""
    for budget in BUDGETS:
        for condition in CONDITIONS:
            if rows := summarise(runs, budget, condition):
                yield budget, condition, rows


def show(runs: list[dict]) -> None:
    """Print a table per condition, and the recall sums of all conditions next to each other."""
    for budget, condition, rows in list_tables(runs):
        kind, rate = split_condition(condition)
        seeds = ", ".join(map(str, sorted({seed for row in rows for seed in row["seeds"]})))
        print(f"\n{condition}: {rate} % of the captions wrong, {KINDS[kind]}; {BUDGETS[budget]}; seeds {seeds}")
        print(format_results_table(rows, COLUMNS, DECIMALS))
    for budget, title in BUDGETS.items():
        for figure in ("last", "averaged"):
            found = {name: summarise(runs, budget, name) for name in CONDITIONS}
            by_method = {
                method: {name: row[figure] for name, rows in found.items() for row in rows
                         if row["method"] == method and figure in row}
                for method in METHODS
            }  # fmt: skip
            rows = [{"method": method, **row} for method, row in by_method.items() if row]
            if rows:
                print(f"\n{COLUMNS[figure]}, all conditions; {title}")
                shown = {name: name for name in CONDITIONS if any(name in row for row in rows)}
                print(format_results_table(rows, {"method": "method", **shown}, 1))


# ---- documents ----


def write_docs(runs: list[dict], root: Path = ROOT) -> list[Path]:
    """Write the tables, and the sentences that follow from them, between their markers in the documents."""
    written = []
    for name, marker, render in DOCUMENTS:
        path = root / name
        path.write_text(put_between(path.read_text(encoding="utf-8"), marker, render(runs)), encoding="utf-8")
        written.append(path)
    return written


def put_between(text: str, marker: str, content: str) -> str:
    """The text with the content between the markers."""
    begin, end = _BEGIN.format(marker), _END.format(marker)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{begin.strip()} and {end.strip()} must stand in the document once each")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content.strip()}\n\n{end}{rest.partition(end)[2]}"


def read_between(text: str, marker: str) -> str:
    """What stands between the markers."""
    return text.partition(_BEGIN.format(marker))[2].partition(_END.format(marker))[0].strip()


def render_readme(runs: list[dict]) -> str:
    """Means alone, in few columns: the README is short."""
    shown = [run for run in runs if run["noise"] in IN_README_CONDITIONS]
    return f"{tabulate(shown, 'steps', IN_README, spread=False)}\n\n{render_gains(shown)}"


def render_which_method(runs: list[dict]) -> str:
    parts = [f"With the same number of steps:\n\n{tabulate(runs, 'steps', METHODS)}"]
    if any(run["budget"] == "time" for run in runs):
        parts.append(
            "In the time that plain training takes, scoring charged (a method whose step is dearer makes fewer steps):"
            f"\n\n{tabulate(runs, 'time', METHODS)}"
        )
    return "\n\n".join([*parts, render_sentences(runs)])


def render_results(runs: list[dict]) -> str:
    """A table per kind of noise with all figures; where there are several numbers, they are those of the shares."""
    parts = []
    for kind, title in KINDS.items():
        names = [name for name in CONDITIONS if split_condition(name)[0] == kind and summarise(runs, "steps", name)]
        if not names:
            continue
        found = {name: {row["method"]: row for row in summarise(runs, "steps", name)} for name in names}
        rates = " / ".join(str(split_condition(name)[1]) for name in names)
        heads = [f"{split_condition(name)[1]} %" for name in names]
        heads[0] = f"recall sum, {heads[0]}"
        heads += [
            f"averaged weights, {rates} %",
            f"best epoch by validation, {rates} %",
            "detection AUROC",
            "recovered",
            "won back",
        ]
        lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        for method in [name for name in METHODS if any(name in rows for rows in found.values())]:
            rows = [found[name].get(method, {}) for name in names]
            cells = [_cell(row.get("last")) for row in rows]
            for figure in ("averaged", "best", "detection", "recovered", "won_back"):
                cells.append(" / ".join(_number(row.get(figure), DECIMALS[figure]) for row in rows))
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
        parts.append(f"{title[0].upper()}{title[1:]}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


DOCUMENTS: tuple[tuple[str, str, Callable[[list[dict]], str]], ...] = (
    ("README.md", "noisy_correspondence", render_readme),
    ("docs/which_method.md", "noisy_correspondence", render_which_method),
    ("docs/results.md", "noisy_correspondence", render_results),
)


def tabulate(runs: list[dict], budget: str, methods: Sequence[str], *, spread: bool = True) -> str:
    """Recall sums after the last step, in brackets those of averaged weights, of both kinds of noise side by side."""
    found = {name: {row["method"]: row for row in summarise(runs, budget, name)} for name in CONDITIONS}
    found = {name: rows for name, rows in found.items() if rows}
    heads, kinds = [], set()
    for kind, rate in map(split_condition, found):
        heads.append(f"{rate} %" if kind in kinds else f"{_SHORT[kind]}, {rate} %")
        kinds.add(kind)
    best = {name: _best(rows) for name, rows in found.items()}
    lines = ["| wrong captions | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for method in [name for name in methods if any(name in rows for rows in found.values())]:
        cells = []
        for name, rows in found.items():
            row = rows.get(method, {})
            shown = _cell(row.get("last")) if spread else _number(row.get("last"), 1)
            shown += f" ({_number(row['averaged'], 1)})" if "averaged" in row else ""
            cells.append(f"**{shown}**" if method == best[name] else shown)
        lines.append(f"| {_LABELS.get(method, f'`{method}`')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_SHORT = {
    "random": "at random",
    "neighbours": "nearly fitting",
    "partial": "one noun",
    "absent": "image not in the data",
}
_LABELS = {
    "none": "`none`: plain training",
    "gsc": "soft labels, GSC",
    "gsc+": "soft labels, GSC+ (twice the cost)",
    "oracle": "oracle, which knows the truth",
}


def render_sentences(runs: list[dict]) -> str:
    """What the figures say of the best method and of DISSect, kind by kind."""
    lines = []
    for kind, title in KINDS.items():
        parts = []
        for name, sums in _rank(runs, kind).items():
            winner, places = next(iter(sums)), [*sums]
            part = f"at {split_condition(name)[1]} % `{winner}` is best of {len(sums)} ({sums[winner]:.1f})"
            if "dissect" in sums and winner != "dissect":
                part += f", `dissect` has place {places.index('dissect') + 1} ({sums['dissect']:.1f})"
            parts.append(part)
        if parts:
            lines.append(_wrap(f"- {title[0].upper()}{title[1:]}: {'; '.join(parts)}."))
    return "\n\n".join(part for part in (render_gains(runs), "\n".join(lines)) if part)


def render_gains(runs: list[dict]) -> str:
    """Where DISSect ranks high, and its gains over plain training, after the last step and with averaged weights."""
    gains: dict[str, list[str]] = {"last": [], "averaged": []}
    places = {}
    for kind in KINDS:
        found = _rank(runs, kind, "last")
        ranked = {name: sums for name, sums in found.items() if {"dissect", "none"} <= sums.keys()}
        if not ranked:
            continue
        places[kind] = fmean([*sums].index("dissect") / (len(sums) - 1) for sums in ranked.values())
        rates = " / ".join(str(split_condition(name)[1]) for name in ranked)
        for figure, texts in gains.items():
            values = [_gain(runs, name, figure) for name in ranked]
            if any(value != "-" for value in values):
                texts.append(f"{' / '.join(values)} {_SHORT[kind]} ({rates} %)")
    if not {"random", "neighbours"} <= places.keys():
        return ""
    first = _STRONG if places["neighbours"] < places["random"] else _NOT_STRONG
    text = f"{first} `dissect` against plain training after the last step: {'; '.join(gains['last'])}"
    text += f". With averaged weights: {'; '.join(gains['averaged'])}" if gains["averaged"] else ""
    return _wrap(f"{text}. Bold: the best averaged weights without the truth, at the cost of one network.")


def _gain(runs: list[dict], condition: str, figure: str) -> str:
    sums = {row["method"]: row.get(figure) for row in summarise(runs, "steps", condition)}
    both = sums["dissect"], sums["none"]
    return f"{both[0]['mean'] - both[1]['mean']:+.1f}" if all(both) else "-"


def _rank(runs: list[dict], kind: str, figure: str = "averaged") -> dict[str, dict[str, float]]:
    """Recall sums of a kind's conditions, see `_order`; where there are enough."""
    ranked = {}
    for name in CONDITIONS:
        if split_condition(name)[0] == kind and split_condition(name)[1]:
            sums = _order(summarise(runs, "steps", name), figure)
            if len(sums) >= _FEWEST_TO_RANK:
                ranked[name] = sums
    return ranked


def _wrap(text: str) -> str:
    return textwrap.fill(text, 119, subsequent_indent="  " if text.startswith("- ") else "", break_on_hyphens=False)


_STRONG = "**Without averaging, DISSect ranks higher where wrong captions nearly fit than where they are random.**"
_NOT_STRONG = "In these runs DISSect ranks no higher where wrong captions nearly fit than where they are random."


def _best(rows: dict[str, dict]) -> str | None:
    ranked = _order(rows.values())
    return next(iter(ranked)) if len(ranked) >= _FEWEST_TO_RANK else None


def _order(rows: Iterable[dict], figure: str = "averaged") -> dict[str, float]:
    """Recall sums by method, the best first, without the oracle, twice the cost, and fewer seeds than others."""
    known = [row for row in rows if figure in row]
    most = max((len(row["seeds"]) for row in known), default=0)
    sums = {row["method"]: row[figure]["mean"] for row in known if len(row["seeds"]) == most}
    sums = {method: value for method, value in sums.items() if method not in ("oracle", *TWICE)}
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _cell(figure: dict | None) -> str:
    if not figure:
        return "-"
    return f"{figure['mean']:.1f}" + ("" if figure["std"] is None else f" ± {figure['std']:.1f}")


def _number(figure: dict | None, digits: int) -> str:
    return f"{figure['mean']:.{digits}f}" if figure else "-"
