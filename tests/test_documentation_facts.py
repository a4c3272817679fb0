"""Tables, figures, links and the shape of README.md and docs/ agree with the code and with the measurements."""

import importlib
import json
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml
from testing.document_pages import PAGES, ROOT, TEXTS, anchors, first_column, inline_code, links, table

from hf_dissect import Recipe
from hf_dissect.data.loading import SOURCES
from hf_dissect.distillation import METHODS
from hf_dissect.mola import PixelRouter
from hf_dissect.recipe.file import shipped_recipes
from hf_dissect.selection import STRATEGIES

MEASURED = ROOT / "benchmarks" / "results"


def test_readme_can_be_read_in_two_minutes():
    assert len((ROOT / "README.md").read_bytes()) <= 9_000


def test_the_site_shows_every_page_and_nothing_else():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    shown = [page for entry in nav for page in (next(iter(entry.values())) if isinstance(entry, dict) else [entry])]
    assert [f"docs/{page}" for page in shown] == list(PAGES[1:])
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} == set(PAGES[1:])
    listed = {f"docs/{link}" for link in links("docs/index.md")}
    assert listed == set(PAGES[2:])


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    folder = (ROOT / page).parent
    for link in links(page):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = ((folder / file) if file else ROOT / page).resolve()
        assert target.exists(), link
        # The site has only what is in docs/.
        assert page == "README.md" or target.is_relative_to(ROOT / "docs"), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), link


def test_readme_links_to_every_kind_of_page():
    inside = [link for link in links("README.md") if not link.startswith(("https://", "#"))]
    assert {"LICENSE", "benchmarks/README.md", "docs/images/quickstart.svg", "docs/results.md"} <= set(inside)
    assert {page for page in PAGES[1:]} - set(inside) == {"docs/index.md"}


def test_tables_name_what_there_is():
    assert sorted(first_column("docs/strategies.md", "name")) == sorted(STRATEGIES)
    assert sorted(first_column("README.md", "method")) == sorted(STRATEGIES)
    assert sorted(first_column("docs/recipes.md", "shipped recipe")) == sorted(shipped_recipes())
    assert first_column("docs/distillation.md", "`distillation.method`") == [*METHODS, "auto"]
    assert first_column("docs/data.md", "`data.source`") == list(SOURCES)


def test_the_index_of_papers_names_every_recipe():
    of_papers = {name for row in table("docs/paper_index.md", "paper") for name in re.findall(r"`([^`]+)`", row[2])}
    assert of_papers == set(shipped_recipes())


def test_run_files_are_those_of_a_run():
    named = first_column("docs/run_folder.md", "in the run folder")
    assert {"recipe.yaml", "metrics.json", "report.html", "ledger.safetensors", "selection.parquet"} <= set(named)


def test_the_cost_table_follows_from_the_formula():
    rows = re.findall(
        r"^\| (0\.\d) \| 3 B \| ([\d.]+) B \| ([\d.]+) B \|$", TEXTS["docs/costs.md"], flags=re.MULTILINE
    )
    assert len(rows) == 3
    for ratio, scored, random in rows:
        assert float(scored) == pytest.approx(1 + 3 * float(ratio)) and float(random) == pytest.approx(
            3 * float(ratio)
        )


@pytest.fixture
def noisy_tables(monkeypatch):
    """The module of the benchmark that writes tables into the documents."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("noisy_tables")


def test_recall_sums_are_those_that_were_measured(noisy_tables):
    """What stands between the markers is what `--write-docs` writes from the runs."""
    runs = noisy_tables.modernise(json.loads((MEASURED / "noisy_correspondence.json").read_text())["runs"])
    for page, marker, render in noisy_tables.DOCUMENTS:
        assert noisy_tables.read_between(TEXTS[page], marker) == render(runs).strip(), page
    sums: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run["budget"] == "steps":
            sums.setdefault((run["method"], run["noise"]), []).append(run["last"])
    first = {method: values for (method, noise), values in sums.items() if noise == "random20"}
    rows = dict(
        re.findall(
            r"^\| `([^`]+)` \| ([^|(]+?) (?:\(|\|)",
            TEXTS["docs/results.md"].split("Captions exchanged at random:")[1].split("\n\n")[1],
            re.M,
        )
    )
    for method in ("none", "dissect", "oracle"):
        shown = f"{mean(first[method]):.1f} ± {stdev(first[method]):.1f}"
        assert f" {shown}" in TEXTS["docs/which_method.md"]
        assert f" {mean(first[method]):.1f} " in noisy_tables.read_between(TEXTS["README.md"], "noisy_correspondence")
        assert rows[method] == shown or "random0" in {noise for _, noise in sums}


@pytest.mark.parametrize(
    ("heading", "file"),
    [("## Selection on Flickr8k", "flickr8k_features"), ("## The scenes of the quickstart", "quickstart")],
)
def test_comparisons_are_those_that_were_measured(heading, file):
    measured = json.loads((MEASURED / f"{file}.json").read_text())["table"]
    results = TEXTS["docs/results.md"].split(heading)[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (\S+ ± \S+) \| (\S+ ± \S+) \|", results, flags=re.MULTILINE)
    assert rows == [
        (row["strategy"], *(f"{row[key]['mean']:.1f} ± {row[key]['std']:.1f}" for key in _FIRST_COLUMNS))
        for row in measured
    ]


_FIRST_COLUMNS = ("recall_sum", "image_to_text_R@1")


def test_the_costs_of_mola_are_those_that_were_measured():
    columns = [("lora_Er", "lora_r"), ("router", "lora_Er"), ("grad_mixed", "lora_r"), ("grad_one_task", "lora_r")]
    columns += [("poly", "lora_r"), ("xlora", "lora_r")]
    expected = []
    for model in ("clip", "llama", "resnet"):
        measured = json.loads((MEASURED / f"mola_cost_{model}.json").read_text())
        for experts, methods in measured["experts"].items():
            ratios = [methods[name][f"ratio_to_{to}_median"] if name in methods else None for name, to in columns]
            expected.append([model, experts, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    assert table("docs/results.md", "base") == expected


def show_share(cell: dict[str, float]) -> str:
    return f"{100 * cell['mean']:.1f} ± {100 * cell['deviation']:.1f}"


def test_the_networks_that_route_are_those_that_were_measured():
    networks = json.loads((MEASURED / "mola_router.json").read_text())["networks"]
    places = [f"{data}, {loss}" for data in ("tasks", "pacs") for loss in ("labels", "decorrelation")]
    expected = [
        [
            f"{made['parameters']:,}",
            f"{made['ms']:.0f}",
            f"{made['step']:.2f}",
            *(show_share(made[place]["accuracy"]) for place in places),
        ]
        for made in networks.values()
    ]
    assert [row[1:] for row in table("docs/results.md", "network")] == expected
    counts = {name: sum(part.numel() for part in PixelRouter(4, architecture=name).parameters()) for name in NETWORKS}
    assert counts == {name: networks[name]["parameters"] for name in NETWORKS}


NETWORKS = ("resnet8", "resnet20")


def test_the_accuracies_of_fine_tuning_on_domains_are_those_that_were_measured():
    measured = json.loads((MEASURED / "mola_clip_domains.json").read_text())
    expected = []
    for method, domains in measured["methods"].items():
        own = [
            made for made in measured["runs"] if (made["method"], made["lr"]) == (method, measured["rates"][method])
        ]
        for domain, cell in domains.items():
            assert cell["mean"] == pytest.approx(mean(made["test"][domain] for made in own))
        cells = [
            f"{100 * cell['mean']:.1f}" if cell["deviation"] is None else show_share(cell) for cell in domains.values()
        ]
        expected.append([method, *cells, f"{own[0]['parameters']:,}"])
    shown = table("docs/results.md", "fine-tuning")
    assert [[re.findall("`([^`]+)`", row[0])[0], *row[1:]] for row in shown] == expected


def test_the_tables_of_distillation_are_those_that_were_measured(noisy_tables):
    benchmark = importlib.import_module("distillation")
    runs = json.loads((MEASURED / "distillation.json").read_text())["runs"]
    shown = noisy_tables.read_between(TEXTS["docs/results.md"], benchmark.MARKER)
    assert shown == benchmark.markdown(runs).strip()


def test_benchmarks_named_in_the_text_take_these_options():
    named = [shlex.split(code) for code in inline_code() if code.startswith("python ")]
    assert len(named) > 10
    for words in named:
        source = Path(ROOT, words[1]).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), words


def test_commands_named_in_the_text_fit_their_recipes():
    named = [shlex.split(code) for code in inline_code() if re.match(r"hf-dissect (train|compare) ", code)]
    assert len(named) >= 4
    for _, _, recipe, *rest in named:
        Recipe.load(recipe).with_overrides([word for word in rest if re.match(r"[a-z_.]+=", word)])


def test_files_named_in_the_text_exist():
    named = [code for code in inline_code() if re.fullmatch(r"(benchmarks|docs|recipes)/[\w./]+", code)]
    assert named and all((ROOT / code).exists() for code in named)
