"""What a router learnt: measured on real pairs at the end of a run, kept in its folder, and shown in its report."""

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from testing import tiny_models
from testing.html_page import Page
from testing.tiny_models import with_lora, with_mola

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.data.pairs import PairDataset, as_pairs
from hf_dissect.evaluation.expert_weights import MAX_PAIRS
from hf_dissect.mola import mola_routing
from hf_dissect.report.data import RunSummary
from hf_dissect.report.selection import write_report

SCRIPT = "<script>alert(1)</script>"
STYLES = ("night", "day", "dusk")


def styled_pairs(num_rows: int, styles=STYLES, seed: int = 0) -> Dataset:
    """Pictures whose brightness is that of their style, with drawn places; the styles come in blocks."""
    levels = {"night": 10, "day": 245, "dusk": 128}
    drawn = np.random.default_rng(seed)
    rows = [
        {
            "image": Image.fromarray(
                np.clip(drawn.normal(levels.get(style, 60), 6, (32, 32, 3)), 0, 255).astype(np.uint8)
            ),
            "caption": tiny_models.CAPTIONS[(row * len(styles) + number) % len(tiny_models.CAPTIONS)],
            "style": style,
        }
        for number, style in enumerate(styles)
        for row in range(num_rows // len(styles))
    ]
    return Dataset.from_list(rows)


def make_trainer(folder, train=None, evaluation=None, model=None, **settings) -> DissectTrainer:
    clip, processor = tiny_models.tiny_clip()
    torch.manual_seed(0)
    common = dict(per_device_train_batch_size=24, learning_rate=1e-2, report_to="none", max_steps=20, logging_steps=10)
    common |= dict(per_device_eval_batch_size=7, save_strategy="no", use_cpu=True, disable_tqdm=True)
    return DissectTrainer(
        model=with_router(clip) if model is None else model(clip),
        processing_class=processor,
        train_dataset=styled_pairs(48) if train is None else train,
        eval_dataset=evaluation,
        args=DissectTrainingArguments(
            str(folder), **{**common, "task_column": "style", "selection_strategy": "none", **settings}
        ),
    )


def with_router(model, **settings):
    config = {"num_experts": 3, "router_input": "embeddings", "decorrelation_weight": 1.0, **settings}
    return with_mola(model, "router", init_weights=False, **config)


def read_page(folder: Path) -> Page:
    page = Page(folder / "report.html")
    assert page.problems == [] and page.stack == []
    return page


def show_section(page: Page) -> str:
    return page.text[page.text.index("What the router learnt") : page.text.index("Where the time went")]


def measure_one_by_one(trainer: DissectTrainer, rows: Dataset, column: str | None = "style") -> dict[str, dict]:
    """Return the mean weights by tower and task, of the model called with each pair by itself."""
    seen: dict[str, dict] = {}
    model = trainer.model.eval()
    for row, pair in zip(rows, as_pairs(rows), strict=True):
        with torch.no_grad():
            model(**forward_inputs(model, trainer.data_collator([pair])))
        for tower, weights in mola_routing(model).last_weights().items():
            seen.setdefault(tower, {}).setdefault(row[column] if column else None, []).append(weights[0].tolist())
    return {
        tower: {task: np.mean(weights, axis=0) for task, weights in by_task.items()} for tower, by_task in seen.items()
    }


def measure_distance(rows) -> float:
    return np.mean([np.abs(a - b).sum() / 2 for number, a in enumerate(rows) for b in rows[:number]])


def check_entry(entry: dict, expected: dict[str, dict]) -> None:
    assert entry["towers"].keys() == expected.keys() == {"image", "text"}
    for tower, by_task in expected.items():
        figures = entry["towers"][tower]
        assert set(entry["tasks"]) == by_task.keys()
        for task, weights in zip(entry["tasks"], figures["weights"], strict=True):
            assert weights == pytest.approx(by_task[task], abs=2e-5)
        if len(by_task) > 1:
            assert figures["distance"] == pytest.approx(measure_distance(list(by_task.values())), abs=2e-5)


def test_styles_that_differ_are_told_apart_in_metrics_and_report(tmp_path):
    rows = styled_pairs(30, seed=1)
    trainer = make_trainer(tmp_path, evaluation=rows)
    trainer.train()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    entry = metrics["router_weights"]
    check_entry(entry, measure_one_by_one(trainer, rows))
    assert entry["tasks"] == ["day", "dusk", "night"] and entry["pairs_by_task"] == [10, 10, 10]
    assert (entry["split"], entry["pairs"], entry["out_of"]) == ("validation", 30, 30)
    image, text = entry["towers"]["image"], entry["towers"]["text"]
    assert image["distance"] > 0.2 > 2 * image["distance_by_chance"]
    assert text["distance"] < 0.1  # the captions do not depend on the style
    assert not mola_routing(trainer.model).training
    page = read_page(tmp_path)
    for tower in (image, text):
        for task, weights in zip(entry["tasks"], tower["weights"], strict=True):
            assert f"{task}10{''.join(f'{weight:.2f}' for weight in weights)}" in page.text.replace("<0.01", "0.00")
        assert f"Two tasks are {tower['distance']:.3f} apart on average" in page.text
        assert f"shuffled tasks: {tower['distance_by_chance']:.3f}" in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "table" and "aria-label" in attrs]
    assert len(labels) == 2 and "Image tower: mean weight of 3 experts for 3 tasks. Two tasks are" in labels[0]
    assert "Measured by the final model on 30 evaluation pairs." in page.text
    shades = [float(attrs["style"].split(":")[1]) for _, attrs in page.tags if attrs.get("class") == "shade"]
    weights = [weight for tower in (image, text) for row in tower["weights"] for weight in row]
    largest = [max(map(max, tower["weights"])) for tower in (image, text) for _ in range(9)]
    assert shades == pytest.approx([weight / top / 2 for weight, top in zip(weights, largest, strict=True)], abs=1e-3)
    # Drawn again from what the folder keeps, without the model.
    again = RunSummary.load(tmp_path / "report_data.json")
    drawn = Page(write_report(tmp_path / "again.html", [again], title="none"))
    assert show_section(drawn) == show_section(page) and len(show_section(page)) > 500


def without_tasks(pairs: Dataset) -> PairDataset:
    return as_pairs(pairs.remove_columns("style"))


def numbered(pairs: Dataset) -> Dataset:
    numbers = [STYLES.index(style) * 5 for style in pairs["style"]]
    return pairs.remove_columns("style").add_column("style", numbers)


@pytest.mark.parametrize(
    "case",
    ["test", "train", "several", "stream", "train stream", "evaluation has none", "numbers", "numbers and names"],
)
def test_weights_are_those_of_the_data_of_the_final_figures(case, tmp_path):
    rows, others, train, test = styled_pairs(18, seed=1), styled_pairs(12, ("dusk",), seed=2), None, None
    evaluation, expected, split, out_of = rows, rows, "validation", 18
    if case == "test":
        test = expected = styled_pairs(24, seed=3)
        split, out_of = "test", 24
    elif case == "train":
        evaluation, expected, split, out_of = None, styled_pairs(48), "train", 48
    elif case == "several":
        evaluation, expected, out_of = {"a": rows, "b": others}, concatenate_datasets([rows, others]), 30
    elif case == "stream":
        train, evaluation, out_of = numbered(styled_pairs(48)), numbered(rows).to_iterable_dataset(), None
        expected = numbered(rows)
    elif case == "train stream":
        expected = numbered(styled_pairs(48))
        train, evaluation, split, out_of = expected.to_iterable_dataset(), None, "train", None
    elif case == "evaluation has none":
        evaluation, expected, split, out_of = without_tasks(rows), styled_pairs(48), "train", 48
    elif case == "numbers and names":
        train = numbered(styled_pairs(48))  # its numbers say nothing of the names of the evaluation
    else:
        train, evaluation, expected = numbered(styled_pairs(48)), numbered(rows), numbered(rows)
    trainer = make_trainer(tmp_path, train, evaluation)
    entry = trainer.finish(test)["router_weights"]
    assert (entry["split"], entry["out_of"], entry["unreadable"]) == (split, out_of, 0)
    check_entry(entry, measure_one_by_one(trainer, expected))
    counts = Counter(expected["style"])
    assert dict(zip(entry["tasks"], entry["pairs_by_task"], strict=True)) == counts
    text = read_page(tmp_path).text
    assert ("task 10" in text) == (case in ("stream", "train stream", "numbers"))
    assert ("the first of a stream" in text) == ("stream" in case)
    assert f"{entry['pairs']} {'test' if test else 'training' if split == 'train' else 'evaluation'} pairs" in text


def test_without_tasks_one_row_shows_all_pairs(tmp_path):
    rows = styled_pairs(18, seed=1)
    trainer = make_trainer(tmp_path, without_tasks(styled_pairs(48)), without_tasks(rows), task_column=None)
    entry = trainer.finish()["router_weights"]
    check_entry(entry, measure_one_by_one(trainer, rows, None))
    assert entry["tasks"] == [None] and entry["towers"]["image"]["distance"] is None
    text = read_page(tmp_path).text
    assert "all pairs18" in text and "The pairs have no tasks (data.task_column)" in text
    assert "How far tasks are apart is not known: there are no two of them." in text and "0.000 apart" not in text


def test_tasks_without_pairs_and_pairs_that_cannot_be_read_are_said(tmp_path):
    rows = styled_pairs(12, ("dusk", "day"), seed=1).to_list()
    rows[0]["caption"] = rows[5]["caption"] = None
    evaluation = Dataset.from_list(rows, features=styled_pairs(3).features)
    trainer = make_trainer(tmp_path, evaluation=evaluation, max_bad_fraction=0.5)
    entry = trainer.finish()["router_weights"]
    assert entry["tasks"] == ["day", "dusk", "night"] and entry["pairs_by_task"] == [6, 4, 0]
    assert entry["unreadable"] == 2 and entry["towers"]["image"]["weights"][2] == [None] * 3
    expected = measure_one_by_one(trainer, Dataset.from_list([row for row in rows if row["caption"]]))
    for tower, by_task in expected.items():
        for task, weights in zip(("day", "dusk"), entry["towers"][tower]["weights"][:2], strict=True):
            assert weights == pytest.approx(by_task[task], abs=2e-5)
        assert entry["towers"][tower]["distance"] == pytest.approx(measure_distance(list(by_task.values())), abs=2e-5)
    text = read_page(tmp_path).text
    assert "night0–––" in text and "no pair of the task was measured: night." in text
    assert "2 more could not be read." in text


def test_large_data_are_sampled(tmp_path):
    rows = styled_pairs(300)
    train = concatenate_datasets([rows] * 8)  # blocks by style, of which the first pairs would show a part
    trainer = make_trainer(tmp_path, train, per_device_eval_batch_size=200)
    entry = trainer.finish()["router_weights"]
    assert (entry["pairs"], entry["out_of"]) == (MAX_PAIRS, 2400)
    assert sum(entry["pairs_by_task"]) == MAX_PAIRS and min(entry["pairs_by_task"]) > 600
    assert "a random sample of 2,048 of 2,400 training pairs" in read_page(tmp_path).text


@pytest.mark.parametrize(
    "model",
    [lambda clip: with_mola(clip, "grad", num_experts=3), with_lora, lambda clip: clip],
    ids=["grad", "lora", "no"],
)
def test_runs_without_a_router_measure_and_show_nothing(model, tmp_path):
    trainer = make_trainer(tmp_path, evaluation=styled_pairs(12), model=model)
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    metrics = trainer.finish()
    assert len(calls) == 2 and "router_weights" not in metrics  # two batches are evaluated, and no more
    page = read_page(tmp_path)
    assert "router" not in page.text.lower().replace("'router'", "") and page.attributes("class").count("heat") == 0


def test_a_tower_without_adapted_layers_has_no_map(tmp_path):
    only_image = partial(with_router, target_modules=r".*vision_model.*q_proj")
    trainer = make_trainer(tmp_path / "one", evaluation=styled_pairs(12), model=only_image)
    assert trainer.finish()["router_weights"]["towers"].keys() == {"image"}
    assert "Text tower" not in read_page(tmp_path / "one").text


# ---- the page, from what a folder may hold ----

WEIGHTS = [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]


def make_metrics(weights=WEIGHTS, tasks=("art", "photo"), counts=(3, 4), distance=0.6, **more) -> dict:
    towers = {"image": {"weights": weights, "distance": distance, "distance_by_chance": 0.1}}
    entry = {"split": "test", "out_of": 7, "pairs": 7, "unreadable": 0, "further_tasks": 0, "towers": towers}
    entry |= {"tasks": list(tasks), "pairs_by_task": list(counts)}
    return {"adapter": {"type": "mola", "settings": {"variant": "router"}}, "router_weights": entry | more}


def draw(tmp_path, *all_metrics) -> Page:
    runs = [RunSummary(f"run {number}", metrics) for number, metrics in enumerate(all_metrics)]
    page = Page(write_report(tmp_path / "report.html", runs, title="t"))
    assert page.problems == [] and page.stack == []
    return page


def test_each_run_of_several_has_its_map(tmp_path):
    page = draw(tmp_path, make_metrics(), {}, make_metrics([[0.25] * 4, [0.0, 0.001, 0.4, 0.599]], distance=0.5))
    assert page.attributes("class").count("heat") == 2
    text = page.text[page.text.index("What the router learnt") :]
    assert "art30.700.200.10" in text and "photo40.00<0.010.400.60" in text
    assert [name for name in ("run 0", "run 1", "run 2") if f"{name}Image tower" in text.replace("\n", "")] == [
        "run 0",
        "run 2",
    ]


def test_names_of_tasks_do_not_become_markup(tmp_path):
    page = draw(tmp_path, make_metrics(tasks=(SCRIPT, f"$x_{{$ \"quoted' & {SCRIPT} \ud800")))
    assert page.count("script") == 0 and page.text.count("alert(1)") == 2


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"adapter": make_metrics()["adapter"]}, "The weights were not measured"),
        ({"router_weights": None, "adapter": None}, "The weights were not measured"),
        (make_metrics(pairs=0), "none of the test pairs could be read"),
        (make_metrics(towers={}), "the model gave none"),
        (make_metrics(counts=(3,)), "incomplete: 2 tasks, 1 numbers of pairs"),
        (make_metrics([[0.5, 0.5]]), "not every task has a weight for every expert"),
        (make_metrics([[0.5, 0.5], [1.0]]), "not every task has a weight for every expert"),
        (make_metrics(None), "not every task has a weight for every expert"),
        (make_metrics([[None] * 3, WEIGHTS[1]], distance=None), "as a weight was not a finite number: art."),
        (make_metrics([[math.nan] * 3, WEIGHTS[1]], distance=math.nan), "as a weight was not a finite number: art."),
        (make_metrics([[None] * 3] * 2, distance=None), "How far the tasks are apart is not known"),
    ],
)
def test_what_is_broken_or_unknown_is_said(metrics, words, tmp_path):
    page = draw(tmp_path, metrics)
    assert words in page.text and "0.000" not in page.text
    assert not {"nan", "None", "null", "inf"} & set(page.text.split())
    text = page.text[page.text.index("What the router learnt") :]
    assert "0.00" not in text
