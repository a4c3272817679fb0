"""The selector selects in any loop: as the Trainer does on the same weights, without knowing a Trainer."""

import ast
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from testing import tiny_models
from torch.utils.data import DataLoader

import hf_dissect.selection.selector as selector_module
from hf_dissect import DissectTrainer, DissectTrainingArguments, OnlineSelector, SelectionCollator, forward_inputs
from hf_dissect.data import as_pairs, shuffle_captions
from hf_dissect.data.bad_rows import BadRows, TooManyBadRows
from hf_dissect.selection import LoopHooks, compute_correlation

B = 16


def batch_of(processor, pairs) -> dict[str, torch.Tensor]:
    return SelectionCollator(processor)([pairs[place] for place in range(B)])


def test_a_plain_loop_keeps_what_the_trainer_keeps(tmp_path):
    model, processor = tiny_models.tiny_clip()
    pairs = as_pairs(tiny_models.tiny_pairs(B))
    selector = OnlineSelector("small_loss", ratio=0.5, num_samples=B)
    selector.begin_epoch(0)
    kept = selector.select(model, batch_of(processor, pairs))
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=pairs,
        args=DissectTrainingArguments(
            str(tmp_path),
            selection_strategy="small_loss",
            record_selection=True,
            per_device_train_batch_size=B,
            max_steps=1,
            train_sampling_strategy="sequential",
            save_run_folder=False,
            report_to="none",
            use_cpu=True,
        ),
    )
    trainer.train()
    recorded = pq.read_table(tmp_path / "selection.parquet").to_pandas()
    assert kept["sample_id"].tolist() == sorted(recorded[recorded.kept].sample_id) and len(kept["sample_id"]) == B // 2
    known = selector.ledger.read("correlation", torch.tensor(recorded.sample_id.to_numpy()))
    torch.testing.assert_close(known, torch.tensor(recorded.correlation.to_numpy()), rtol=1e-5, atol=1e-4)


def test_a_whole_plain_loop_prefers_matched_pairs():
    model, processor = tiny_models.tiny_clip()
    pairs = as_pairs(shuffle_captions(tiny_models.tiny_pairs(64), rate=0.4))
    loader = DataLoader(pairs, batch_size=B, shuffle=True, collate_fn=SelectionCollator(processor))
    selector = OnlineSelector("dissect", ratio=0.5, num_samples=len(pairs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(3):
        selector.begin_epoch(epoch)
        for candidates in loader:
            batch = selector.select(model, candidates)
            assert len(batch["sample_id"]) == B // 2
            outputs = model(**forward_inputs(model, batch), return_loss=True)
            selector.record_training(batch["sample_id"], outputs)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert selector.ledger.column("history").isfinite().all()  # the last warm-up epoch scores every candidate
    assert selector.pop_logs()["selection_kept_share"] == 0.5


def test_what_is_not_scored_is_recorded_in_training():
    model, processor = tiny_models.tiny_clip()
    selector = OnlineSelector("random", num_samples=B)
    batch = selector.select(model, batch_of(processor, as_pairs(tiny_models.tiny_pairs(B))))
    assert not selector.ledger.column("correlation").isfinite().any()
    outputs = model(**forward_inputs(model, batch))
    selector.record_training(batch["sample_id"], outputs)
    expected = compute_correlation(outputs.image_embeds, outputs.text_embeds).detach()
    torch.testing.assert_close(selector.ledger.read("correlation", batch["sample_id"]), expected)


def test_random_choices_follow_seed_and_step():
    model, processor = tiny_models.tiny_clip()
    batch = batch_of(processor, as_pairs(tiny_models.tiny_pairs(B)))

    def kept(seed, step=None, calls=1):
        selector = OnlineSelector("random", num_samples=B, seed=seed)
        return [selector.select(model, batch, step=step)["sample_id"].tolist() for _ in range(calls)]

    assert kept(0, calls=3) == [kept(0, step)[0] for step in range(3)]  # without a step, the calls are counted
    assert len({str(kept(seed)) for seed in range(4)}) > 1


def test_unreadable_rows_are_left_out_or_stop_the_loop():
    model, processor = tiny_models.tiny_clip()
    rows = [dict(row) for row in map(as_pairs(tiny_models.tiny_pairs(B)).__getitem__, range(B))]
    rows[3]["caption"] = None
    batch = SelectionCollator(processor)(rows)
    selector = OnlineSelector("none", num_samples=B)
    assert selector.select(model, batch)["sample_id"].tolist() == [row for row in range(B) if row != 3]
    assert selector.bad_rows.summary()["ids"] == [3]
    with pytest.raises(TooManyBadRows):
        OnlineSelector("none", num_samples=B, bad_rows=BadRows(0.01, B)).select(model, batch)


def test_a_saved_state_continues():
    model, processor = tiny_models.tiny_clip()
    batch = batch_of(processor, as_pairs(tiny_models.tiny_pairs(B)))
    first, second = OnlineSelector("small_loss", num_samples=B), OnlineSelector("small_loss", num_samples=B)
    first.begin_epoch(2)
    first.select(model, batch)
    second.load_state_dict(first.state_dict())
    assert (second.epoch, second.updated_epoch) == (2, 2)
    assert second.monitor.run.figures() == first.monitor.run.figures()
    assert second.monitor.score_histogram() == first.monitor.score_histogram()


def test_the_loop_is_asked_through_its_hooks():
    model, processor = tiny_models.tiny_clip()
    batch, asked = batch_of(processor, as_pairs(tiny_models.tiny_pairs(B))), []

    def agree(num_good):
        asked.append(num_good)
        return [num_good]

    def refuse(values, name, sample_id):
        raise ArithmeticError(f"{name} of {len(sample_id)}")

    OnlineSelector("random", num_samples=B, hooks=LoopHooks(agree=agree, check_finite=refuse)).select(model, batch)
    assert asked == [B]
    with pytest.raises(ArithmeticError, match="the correlation of 16"):
        OnlineSelector("clipscore", num_samples=B, hooks=LoopHooks(check_finite=refuse)).select(model, batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"scope": "world"}, "scope='world'"),
        ({"strategy": "smallest"}, "choose one of"),
        ({"strategy": "random", "momentum": 0.5}, "momentum"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OnlineSelector(**{"strategy": "dissect", **settings})


def test_the_selector_knows_no_trainer():
    tree = ast.parse(Path(selector_module.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [
        name for name in modules if "trainer" in name or "hf_dissect.training" in name or "transformers" in name
    ]
