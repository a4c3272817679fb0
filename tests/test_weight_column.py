"""Training with weights of the data: multiplied with the loss, whatever else weights or selects the pairs."""

import pytest
import torch
from testing import tiny_models
from testing.launched import on_ranks

from hf_dissect import DissectTrainer, DissectTrainingArguments, OnlineSelector, SelectionCollator
from hf_dissect.data import as_pairs
from hf_dissect.selection import Selection, SelectionStrategy

PAIRS = 32
WEIGHTS = [0.0 if row % 5 == 0 else 0.25 * (row % 7) for row in range(PAIRS)]


def table(weights=WEIGHTS):
    return tiny_models.tiny_pairs(PAIRS).add_column("importance", list(weights))


def trainer_of(folder, train, *, collator=None, strategy=None, evaluation=None, **settings) -> DissectTrainer:
    model, processor = tiny_models.tiny_clip()
    defaults = dict(
        per_device_train_batch_size=16, selection_strategy="none", weight_column="importance", max_steps=4,
        optim="sgd", learning_rate=0.05, save_strategy="no", save_run_folder=False, report_to="none",
        disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator,
        strategy=strategy,
        args=DissectTrainingArguments(str(folder), **{**defaults, **settings}),
    )


def weights_of(trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class GivesWeights(SelectionStrategy):
    """Keeps all and weighs by the id; the weights of the data are none of its business."""

    name = "gives_weights"

    def needs_scores(self, epoch):
        return False

    def select(self, scores, ledger, k):
        chosen = torch.arange(k)
        return Selection(chosen, weights=1 + scores.sample_id[chosen] / PAIRS)


def first_loss(trainer) -> tuple[float, torch.Tensor]:
    """The loss of the first batch before any step, and the batch that was kept."""
    batch = next(iter(trainer.get_train_dataloader()))
    kept = trainer.selector.select(trainer.model, batch, step=0)
    return trainer.compute_loss(trainer.model.eval(), kept).item(), kept


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("strategy", [None, "gives_weights"])
def test_the_loss_is_the_mean_of_weight_times_loss(strategy, ratio, tmp_path):
    trainer = trainer_of(
        tmp_path, table(), strategy=GivesWeights() if strategy else None, selection_ratio=ratio,
        selection_strategy="random",
    )  # fmt: skip
    loss, kept = first_loss(trainer)
    ids = kept["sample_id"]
    assert len(ids) == 16 * ratio and "given_weight" not in kept
    expected = torch.tensor(WEIGHTS)[ids] * (1 + ids / PAIRS if strategy else 1)
    torch.testing.assert_close(kept["pair_weight"], expected.float())
    with torch.no_grad():
        inputs = {name: kept[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        logits = trainer.model.eval()(**inputs)["logits_per_text"]
    losses = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2
    assert loss == pytest.approx((expected * losses).mean().item(), rel=1e-5)  # not divided by the sum of the weights


def test_equal_weights_change_nothing_and_doubled_ones_double_the_loss(tmp_path):
    plain = trainer_of(tmp_path, table(), weight_column=None)
    plain.train()
    ones = trainer_of(tmp_path, table([1.0] * PAIRS))
    ones.train()
    assert torch.equal(weights_of(plain), weights_of(ones)) and losses_of(plain) == losses_of(ones)
    once, twice = (first_loss(trainer_of(tmp_path, table([weight] * PAIRS)))[0] for weight in (1.0, 2.0))
    assert twice == pytest.approx(2 * once)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gsc": {"warmup_epochs": 0, "gamma": 0.5}},
        {"noisy_channel": {}},
        {"rince": {}},
        {"symnce": {}},
        {"selection_strategy": "small_loss"},
        {"selection_strategy": "info_batch"},
        {"selection_strategy": "noisy_channel"},
        {"gradient_accumulation_steps": 2},
        {"grad_cache_chunk_size": 3},
    ],
    ids=lambda settings: next(iter(settings.items()), "plain")[-1 if "selection_strategy" in settings else 0],
)
def test_pairs_of_weight_zero_teach_nothing(settings, tmp_path):
    """All weights 0: loss 0, finite, and the weights of the model stay."""
    trainer = trainer_of(tmp_path, table([0.0] * PAIRS), **settings)
    before = weights_of(trainer).clone()
    trainer.train()
    assert losses_of(trainer) == [0.0] * 4
    assert torch.equal(weights_of(trainer), before)


def test_weights_go_with_streams_workers_and_chunks(tmp_path):
    ends = []
    for settings in ({}, {"grad_cache_chunk_size": 5}, {"dataloader_num_workers": 2}):
        stream = table().add_column("key", list(range(PAIRS))).to_iterable_dataset(2)
        trainer = trainer_of(
            tmp_path, stream, id_column="key", shuffle_buffer=0, gsc={"gamma": 0.1}, per_device_train_batch_size=8,
            **settings,
        )  # fmt: skip
        trainer.train()
        ends.append(losses_of(trainer))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4) and all(loss > 0 for loss in ends[2])


def test_evaluation_ignores_weights_and_needs_no_column(tmp_path):
    evaluation = tiny_models.tiny_pairs(8, seed=1)
    weighted = trainer_of(tmp_path, table(), evaluation=evaluation)
    plain = trainer_of(tmp_path, table(), evaluation=evaluation, weight_column=None)
    assert weighted.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    with_column = evaluation.add_column("importance", [-1.0] * 8)
    assert weighted.evaluate(with_column)["eval_loss"] == plain.evaluate()["eval_loss"]
    assert weighted.evaluate(table())["eval_loss"] == plain.evaluate(table())["eval_loss"]


def test_weights_of_a_plain_loop():
    model, processor = tiny_models.tiny_clip()
    pairs = as_pairs(table(), weight="importance")
    batch = SelectionCollator(processor)(pairs.__getitems__(list(range(16))))
    kept = OnlineSelector("small_loss", num_samples=PAIRS).select(model, batch)
    assert kept["pair_weight"].tolist() == [WEIGHTS[place] for place in kept["sample_id"].tolist()]


# ---- refused before work starts ----


class OwnPairs(torch.utils.data.Dataset):
    def __init__(self, key="weight"):
        self.key, self.rows = key, list(as_pairs(tiny_models.tiny_pairs(PAIRS)))

    def __len__(self):
        return PAIRS

    def __getitem__(self, place):
        return {**self.rows[place], self.key: WEIGHTS[place]}


class OwnStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from OwnPairs()


def test_columns_that_would_not_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: weight_column='importance': no such column; the data has"):
        trainer_of(tmp_path, tiny_models.tiny_pairs(PAIRS))
    with pytest.raises(ValueError, match="train_dataset: weight_column='importance': row 3 has weight -1"):
        trainer_of(tmp_path, table([1.0, 1, 1, -1, *[1.0] * (PAIRS - 4)]))
    with pytest.raises(ValueError, match="wrapped without it; pass weight='importance' to as_pairs"):
        trainer_of(tmp_path, as_pairs(table()))
    with pytest.raises(ValueError, match="'importance' would not be read: OwnPairs makes its pairs itself.*'weight'"):
        trainer_of(tmp_path, OwnPairs("mass"))
    with pytest.raises(ValueError, match="'importance' would not be read: OwnStream makes its pairs itself"):
        trainer_of(tmp_path, OwnStream())
    trainer = trainer_of(tmp_path, OwnPairs(), weight_column=None)
    _, kept = first_loss(trainer)
    assert kept["pair_weight"].tolist() == [WEIGHTS[place] for place in kept["sample_id"].tolist()]


class DropsWeights:
    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        return {name: value for name, value in self.collate(rows).items() if name != "given_weight"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_collator_that_drops_the_weights_is_refused(streaming, tmp_path):
    collator = DropsWeights(SelectionCollator(tiny_models.tiny_clip()[1]))
    train = table().to_iterable_dataset(2) if streaming else table()
    with pytest.raises(ValueError, match="data_collator drops the weights of the pairs"):
        trainer_of(tmp_path, train, collator=collator).train()


def test_a_stream_with_bad_weights_skips_and_counts_them(tmp_path):
    rows = table([float("nan") if row in (3, 20) else 1.0 for row in range(PAIRS)])
    trainer = trainer_of(
        tmp_path, rows.to_iterable_dataset(2), max_bad_fraction=0.5, per_device_train_batch_size=8, shuffle_buffer=0
    )
    trainer.train()
    assert trainer.bad_rows.summary()["reasons"] == {"weight missing or not a number of at least 0": 2}
    assert {problem["problem"] for problem in trainer.bad_rows.summary()["problems"]} == {"weight NaN"}


# ---- over processes ----


def train_on_ranks() -> tuple[torch.Tensor, list[float]]:
    import tempfile

    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, table(), per_device_train_batch_size=16 // world_size, max_steps=2)
        trainer.train()
        return weights_of(trainer), losses_of(trainer)


def test_two_processes_train_as_one(tmp_path):
    results = on_ranks([2], tmp_path, train_on_ranks)
    one, two = train_on_ranks(), results[2]
    torch.testing.assert_close(two[0], one[0], rtol=1e-4, atol=1e-5)
