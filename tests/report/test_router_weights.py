"""What a router learnt: measured on real pairs at the end of a run, kept in its folder, and shown in its report."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from testing import tiny_models
from testing.html_page import Page
from testing.tiny_models import with_lora, with_mola

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.data.model_inputs import forward_inputs
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


def make_trainer(folder, train=None, evaluation=None, variant="router", adapter=None, **settings) -> DissectTrainer:
    model, processor = tiny_models.tiny_clip()
    torch.manual_seed(0)
    config = {"num_experts": 3, "router_input": "embeddings", "decorrelation_weight": 1.0, **(adapter or {})}
    common = dict(per_device_train_batch_size=24, learning_rate=1e-2, report_to="none", max_steps=20, logging_steps=10)
    common |= dict(per_device_eval_batch_size=7, save_strategy="no", use_cpu=True, disable_tqdm=True)
    return DissectTrainer(
        model=with_mola(model, variant, **config) if variant else with_lora(model),
        processing_class=processor,
        train_dataset=styled_pairs(48) if train is None else train,
        eval_dataset=evaluation,
        args=DissectTrainingArguments(
            str(folder), **{**common, "task_column": "style", "selection_strategy": "none", **settings}
        ),
    )


def finish(trainer: DissectTrainer) -> tuple[dict, Page]:
    """Train and complete the folder; the entry of the metrics and the page."""
    trainer.train()
    folder = trainer.args.output_dir
    metrics = json.loads(open(f"{folder}/metrics.json").read())
    return metrics, Page_of(folder)


def Page_of(folder) -> Page:
    from pathlib import Path

    page = Page(Path(folder) / "report.html")
    assert page.problems == [] and page.stack == []
    return page


def distance_of(rows) -> float:
    pairs = [(a, b) for number, a in enumerate(rows) for b in rows[:number]]
    return sum(sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2 for a, b in pairs) / len(pairs)


def test_styles_that_differ_are_told_apart(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=styled_pairs(30, seed=1))
    metrics, page = finish(trainer)
    entry = metrics["router_weights"]
    print(json.dumps(entry, indent=1))
    print(page.text[page.text.index("What the router"):][:1500])
    assert False
