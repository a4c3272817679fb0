"""Training on balanced pairs: exact visits with any strategy, resume and ranks, and the sampling file of a run."""

from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from testing import balanced_ranks, tiny_models
from testing.balanced_ranks import CLUSTERS, ROWS, SIZES, make_trainer, stop_and_resume, table
from testing.launched import on_ranks

from hf_dissect import DissectTrainingArguments
from hf_dissect.data import as_pairs
from hf_dissect.data.cluster_balance import find_power_weights, find_visits
from hf_dissect.data.sampling_file import read_sampling_file, write_cluster_weights
from hf_dissect.recipe import Recipe, RecipeError


def expected_visits(strength=0.5, most=8) -> np.ndarray:
    sizes = np.array(list(SIZES.values()))
    visits = dict(zip(SIZES, find_visits(sizes, find_power_weights(sizes, strength), most), strict=True))
    return np.array([visits[cluster] for cluster in CLUSTERS])


def check_visits(batches, epochs, visits):
    total = np.bincount(np.concatenate(batches), minlength=ROWS)
    assert total.sum() == epochs * ROWS
    assert (np.abs(total - epochs * visits) < 1).all()
    for cluster in SIZES:
        own = np.array([one == cluster for one in CLUSTERS])
        assert abs(total[own].sum() - epochs * visits[own].sum()) < 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"balance_strength": 1.0, "balance_max_visits": 3},
        {"selection_strategy": "none", "balance_strength": 0.0},
        {"selection_strategy": "small_loss", "selection_rescore_every": 3},
        {"selection_strategy": "dissect", "selection_options": {"variant": "momentum"}, "dataloader_num_workers": 1},
        {"selection_strategy": "gsc", "gradient_accumulation_steps": 3, "selection_usage_penalty": 1.0},
    ],
    ids=str,
)
def test_epochs_have_their_length_and_pairs_their_visits(settings, tmp_path):
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == 4 * 15 // settings.get("gradient_accumulation_steps", 1)
    most = settings.get("balance_max_visits", 8)
    visits = expected_visits(settings.get("balance_strength", 0.5), most)
    check_visits(trainer.seen, 4, visits)
    assert all(len(set(batch)) == len(batch) for batch in trainer.seen)
    written = pq.read_table(tmp_path / "sampling.parquet").to_pydict()
    assert written["sample_id"] == list(range(ROWS)) and written["cluster"] == CLUSTERS
    np.testing.assert_allclose(written["weight"], visits)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selection_strategy": "small_loss", "selection_rescore_every": 3},
        {"stream": True},
        {"stream": True, "dataloader_num_workers": 2},
    ],
    ids=str,
)
def test_a_resumed_run_is_bit_for_bit_the_same(settings, tmp_path):
    if settings.get("stream"):
        write_cluster_weights(tmp_path / "weights.parquet", SIZES)
        settings = {**settings, "sampling_file": str(tmp_path / "weights.parquet")}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = stop_and_resume(tmp_path / "stopped", 18, **settings)
    assert resumed.seen == whole.seen[15:]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_file_of_a_run_serves_other_runs(tmp_path):
    first = make_trainer(tmp_path / "first", id_column="key")
    first.train()
    again = make_trainer(tmp_path / "again", id_column="key", sampling_file=str(tmp_path / "first"))
    again.train()
    assert again.seen == first.seen
    # By id, in data without the column and in another order, and as a stream.
    other = table().remove_columns("cluster").select(range(ROWS - 1, -1, -1))
    by_id = make_trainer(
        tmp_path / "by-id", other, id_column="key", balance_column=None, sampling_file=str(tmp_path / "first")
    )
    ids = by_id.train_dataset.sample_ids
    weights = read_sampling_file(tmp_path / "first").look_up(ids)
    by_id.train()
    place = {one: number for number, one in enumerate(ids.tolist())}
    total = np.bincount([place[one] for batch in by_id.seen for one in batch], minlength=ROWS)
    assert (np.abs(total - 4 * weights) < 1 + 1e-9).all()
    stream = make_trainer(
        tmp_path / "stream", other, stream=True, balance_column=None, sampling_file=str(tmp_path / "first"),
        max_steps=40,
    )  # fmt: skip
    stream.train()
    assert sum(map(len, stream.seen)) == 160 and {one for batch in stream.seen for one in batch} <= set(place)


def test_two_processes_visit_what_one_visits(tmp_path):
    write_cluster_weights(tmp_path / "weights.parquet", SIZES)
    on_ranks([2], tmp_path, partial(balanced_ranks.check_all, tmp_path))
    alone = make_trainer(tmp_path / "alone", per_device_train_batch_size=8, dataloader_drop_last=True)
    alone.train()
    for name in ("table", "penalty", "plan"):
        first, second = torch.load(tmp_path / f"{name}.pt")
        together = [sorted([*one, *other]) for one, other in zip(first, second, strict=True)]
        assert together == [sorted(batch) for batch in alone.seen], name


def test_evaluation_needs_no_clusters(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=tiny_models.tiny_pairs(8, seed=1))
    assert trainer.evaluate()["eval_loss"] > 0


# ---- refused before work starts ----


class OwnPairs(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = list(as_pairs(tiny_models.tiny_pairs(ROWS)))

    def __len__(self):
        return ROWS

    def __getitem__(self, place):
        return self.rows[place]


def test_columns_and_files_that_do_not_fit_are_refused(tmp_path, caplog):
    write_cluster_weights(tmp_path / "other.parquet", {"x": 3, "y": 9})
    write_cluster_weights(tmp_path / "some.parquet", {"large": 3, "y": 9})
    make_trainer(tmp_path / "run").train()
    cases = [
        ({"balance_column": "group"}, "train_dataset: balance_column='group': no such column; the data has"),
        ({"train": as_pairs(table())}, "wrapped without it; pass balance='cluster' to as_pairs"),
        ({"train": OwnPairs()}, "balance_column='cluster' would not be read: OwnPairs makes its pairs itself"),
        ({"stream": True}, "a stream does not know the sizes of its clusters beforehand; pass sampling_file"),
        ({"sampling_file": str(tmp_path / "other.parquet")}, "knows none of the 60 training pairs"),
        ({"sampling_file": str(tmp_path / "other.parquet"), "balance_column": None}, "has clusters and no ids; name"),
        (
            {"sampling_file": str(tmp_path / "run"), "balance_column": None, "id_column": "key"},
            "is of 60 pairs by row",
        ),
        ({"sampling_file": str(tmp_path / "run"), "balance_column": None, "stream": True}, "knows its pairs by keys"),
        ({"sampling_file": str(tmp_path / "missing")}, "found neither sampling.parquet"),
    ]
    for settings, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make_trainer(tmp_path / "x", **settings)
    caplog.clear()
    make_trainer(tmp_path / "x", sampling_file=str(tmp_path / "some.parquet"))
    assert "some.parquet lacks 10 of the 60 training pairs, which have the weight 1" in caplog.text
    assert "balance_column cluster: 5 of 60 pairs have no value; together they are one cluster" in caplog.text
    make_trainer(tmp_path / "x", per_device_train_batch_size=20)
    assert "an epoch has 3 batches, so that a pair is visited at most 2 times" in caplog.text
    make_trainer(tmp_path / "x", table().remove_columns("cluster").add_column("cluster", ["one"] * ROWS))
    assert "The balance changes nothing" in caplog.text


@pytest.mark.parametrize(
    ("data", "other", "message"),
    [
        (
            {"balance_column": "c", "sampling_file": "f", "balance_strength": 1.0},
            {},
            "the weights come from sampling_f",
        ),
        ({"balance_column": "c", "streaming": True}, {"training": {"max_steps": 5}}, "'c' needs data.sampling_file"),
        (
            {"balance_column": "c"},
            {"selection": {"strategy": "coreset", "reference": "x"}},
            "the strategy coreset, wh",
        ),
        (
            {"balance_column": "c"},
            {"training": {"train_sampling_strategy": "sequential"}},
            "train_sampling_strategy 's",
        ),
        ({"balance_column": "c", "balance_strength": 2}, {}, "data.balance_strength: 2 is not allowed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data, other, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"name": "x", "model": {"config": {"model_type": "clip"}}, "data": data, **other})
    assert message in str(caught.value)
    given = {**data, **other.get("training", {})}
    given.pop("streaming", None)
    if "coreset" in str(other):
        given |= {"selection_strategy": "coreset", "selection_reference": "x"}
    if "streaming" not in data:
        with pytest.raises(ValueError, match="balance_"):
            DissectTrainingArguments("x", use_cpu=True, **given)
