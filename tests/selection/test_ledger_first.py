"""Ledger-first: pairs are chosen before they are loaded, scored now and then, and none is written off for good."""

import math
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from testing import planned_ranks, tiny_models
from testing.launched import on_ranks
from transformers import TrainerCallback

from hf_dissect import DissectTrainer, DissectTrainingArguments, SelectionStrategy
from hf_dissect.data import as_pairs, shuffle_captions
from hf_dissect.data.pairs import PairDataset

SIZE, B = 48, 12


class Counting(PairDataset):
    """Pairs that note which of them are read."""

    def __getitems__(self, indices):
        self.__dict__.setdefault("read", []).append(list(indices))
        return super().__getitems__(indices)


def pairs_of(size=SIZE, rate=0.25, kind=Counting, **columns):
    return kind.from_dataset(shuffle_captions(tiny_models.tiny_pairs(size), rate=rate), **columns)


def make_trainer(folder: Path, pairs=None, model=None, strategy=None, **settings) -> DissectTrainer:
    own, processor = tiny_models.tiny_clip()
    defaults = dict(
        selection_strategy="small_loss",
        selection_rescore_every=4,
        per_device_train_batch_size=B,
        num_train_epochs=4,
        learning_rate=1e-3,
        record_selection=True,
        save_strategy="no",
        save_run_folder=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        check_reload=False,
    )
    return DissectTrainer(
        model=own if model is None else model,
        processing_class=processor,
        train_dataset=pairs_of() if pairs is None else pairs,
        strategy=strategy,
        args=DissectTrainingArguments(str(folder), **{**defaults, **settings}),
    )


def record_of(trainer):
    return pq.read_table(Path(trainer.args.output_dir) / "selection.parquet").to_pandas()


def test_what_the_plan_leaves_out_is_not_read(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.remove_callback(trainer.observer)  # which reads the pairs that it shows
    trainer.train_dataset.read = []
    trainer.train()
    sizes = [len(block) for block in trainer.train_dataset.read]
    steps = SIZE // B
    assert trainer.state.global_step == 4 * steps and len(sizes) == 4 * steps
    assert sizes[: 2 * steps] == [B] * 2 * steps and all(B // 2 <= size < B for size in sizes[2 * steps :])
    rows = record_of(trainer)
    assert (rows.groupby("step").size() == B).all() and (rows.groupby("step").kept.sum() == B // 2).all()
    figures = trainer.run_metrics({})["selection"]
    assert figures["kept_share"] == 0.5 and figures["loaded_share"] == pytest.approx(sum(sizes) / (4 * SIZE))
    # In the planned epochs the pairs that were loaded beyond those that train were scored, before that all were.
    assert figures["scored_share"] == pytest.approx((2 * SIZE + sum(sizes[2 * steps :]) - SIZE) / (4 * SIZE))
    logged = [entry for entry in trainer.state.log_history if "selection_loaded_share" in entry]
    assert logged or trainer.args.logging_steps > trainer.state.global_step
    assert trainer.ledger.column("evidence").isfinite().all() and trainer.ledger.column("planned").isfinite().all()


def naive_evidence(images, texts, scale):
    """The evidence by its definition: log of (n - 1) q / (1 - q), with -log q the mean of both directions."""
    logits = scale * images @ texts.T
    loss = (F.cross_entropy(logits, torch.arange(len(logits))) * 0).new_zeros(len(logits))
    for matrix in (logits, logits.T):
        loss += F.cross_entropy(matrix, torch.arange(len(matrix)), reduction="none") / 2
    q = torch.exp(-loss.double())
    return torch.log((len(loss) - 1) * q / (1 - q))


@torch.no_grad()
def test_scores_of_trained_and_of_held_pairs(tmp_path):
    """The pairs that trained are scored among themselves, the others each among these and itself."""
    trainer = make_trainer(tmp_path)
    selector, pairs = trainer.selector, trainer.train_dataset
    model, collator = trainer.model, trainer.data_collator
    chosen, held, left = [3, 8, 11, 40], [5, 9], [1, 2]
    batch = collator(pairs.__getitems__(sorted([*chosen, *held])))
    ids = batch["sample_id"]
    batch["inclusion"] = torch.tensor([1.0 if i in chosen else 0.0 for i in ids.tolist()])
    batch["planned"] = torch.zeros(len(ids))
    batch |= {"unloaded_id": torch.tensor(left), "unloaded_planned": torch.zeros(2)}
    kept = selector.select(model, batch, step=0)
    assert kept["sample_id"].tolist() == chosen and not {"inclusion", "planned", "unloaded_id"} & set(kept)
    model.eval()

    def embed(places):
        rows = collator(pairs.__getitems__(places))
        out = model(
            input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], pixel_values=rows["pixel_values"]
        )
        return out

    outputs = embed(chosen)
    selector.record_training(kept["sample_id"], outputs)
    selector.finish_step(model)
    scale = model.logit_scale.exp()
    evidence = trainer.ledger.read("evidence", torch.tensor([*chosen, *held, *left]))
    wanted = naive_evidence(outputs.image_embeds, outputs.text_embeds, scale)
    torch.testing.assert_close(evidence[:4], wanted.float(), atol=2e-3, rtol=1e-3)
    for place, value in zip(held, evidence[4:6], strict=True):
        everyone = embed([*chosen, place])
        wanted = naive_evidence(everyone.image_embeds, everyone.text_embeds, scale)[-1]
        assert value.item() == pytest.approx(wanted.item(), abs=2e-3)
        own = (everyone.image_embeds[-1] @ everyone.text_embeds[-1]) * 100
        assert trainer.ledger.read("correlation", torch.tensor([place])).item() == pytest.approx(
            max(own.item(), 0), abs=1e-3
        )
    assert evidence[6:].isnan().all() and trainer.ledger.read("correlation", torch.tensor(left)).isnan().all()


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("small_loss", {}),
        ("big_loss", {"named": True, "dataloader_num_workers": 2}),
        ("clipscore", {"named": True, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
        ("ncr", {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
        ("gsc", {"gradient_accumulation_steps": 2}),
        ("dissect", {"selection_options": {"variant": "warmup"}}),
        ("dissect", {"named": True, "selection_options": {"variant": "momentum"}, "grad_cache_chunk_size": 3}),
        ("noisy_channel", {"named": True, "grad_cache_chunk_size": 3, "gradient_accumulation_steps": 2}),
        ("random", {}),
    ],
)
def test_each_strategy_plans(strategy, settings, tmp_path):
    pairs, settings = tiny_models.tiny_pairs(SIZE), dict(settings)
    named = settings.pop("named", False)
    if named:
        pairs = pairs.add_column("name", [f"n{place}" for place in range(SIZE)])
    trainer = make_trainer(
        tmp_path, as_pairs(pairs, sample_id="name" if named else None), selection_strategy=strategy, **settings
    )
    trainer.train()
    figures, rows = trainer.run_metrics({})["selection"], record_of(trainer)
    assert figures["kept_share"] == 0.5 and 0.5 <= figures["loaded_share"] < 0.9
    assert (rows.groupby("epoch").size() == SIZE).all()
    planned = rows[rows.epoch >= trainer.strategy.first_planned_epoch]
    assert len(planned) and (planned.groupby("epoch").kept.sum() == SIZE // 2).all()
    if strategy == "random":
        assert figures["scored_share"] == 0 and figures["loaded_share"] == 0.5
    else:
        assert trainer.ledger.column("correlation").isfinite().all()
    for name in trainer.strategy.plan_columns:
        assert trainer.ledger.column(name).isfinite().all()


def test_none_is_not_affected_and_1_is_as_before(tmp_path):
    trainer = make_trainer(tmp_path, selection_strategy="none")
    assert trainer.selector.plan is None and "planned" not in trainer.ledger.columns
    trainer = make_trainer(tmp_path, selection_rescore_every=1)
    assert trainer.selector.plan is None and trainer.ledger.columns == ("correlation",)


class Stubborn(SelectionStrategy):
    name = "stubborn"
    why_no_plan = "it asks the candidates themselves"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection_rescore_every": 0}, "selection_rescore_every=0 is not allowed; allowed: at least 1"),
        ({"selection_rescore_every": -3}, "selection_rescore_every=-3 is not allowed; allowed: at least 1"),
        ({"selection_rescore_every": 2.5}, "selection_rescore_every=2.5 .* integer"),
        ({"selection_rescore_every": True}, "selection_rescore_every=True .* integer"),
        ({"selection_scope": "global"}, "selection_rescore_every=4 does not go with selection_scope='global'"),
        ({"accelerator_config": {"dispatch_batches": True}}, "selection_rescore_every=4 .* dispatch_batches"),
        ({"scoring_dtype": "int8"}, "scoring_dtype='int8' is not allowed; allowed: bfloat16, float16"),
        (
            {"selection_strategy": "divbs"},
            "'divbs' cannot choose pairs before they are loaded, since it has no method",
        ),
        ({"selection_strategy": "scan"}, "'scan' cannot choose"),
        ({"selection_strategy": "dissect", "selection_options": {"history": "average"}}, "earlier model has to score"),
        ({"strategy": Stubborn()}, "'stubborn' cannot choose .* it asks the candidates themselves; set"),
        ({"pairs": [{"image": None}]}, "sample_ids"),
    ],
)
def test_bad_settings_are_refused(settings, message, tmp_path):
    if "pairs" in settings:

        class Own(torch.utils.data.Dataset):
            pairs = as_pairs(tiny_models.tiny_pairs(SIZE))

            def __len__(self):
                return SIZE

            def __getitem__(self, index):
                return self.pairs[index]

        settings = {"pairs": Own()}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_own_data_and_collators_are_planned(tmp_path):
    """Rows of any kind, and a collator that knows nothing of plans."""
    _, processor = tiny_models.tiny_clip()
    inner = as_pairs(tiny_models.tiny_pairs(SIZE))

    class Own(torch.utils.data.Dataset):
        sample_ids = [7 * place for place in range(SIZE)]
        read: list[int] = []

        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            self.read.append(index)
            return {**inner[index], "sample_id": 7 * index}

    trainer = make_trainer(tmp_path, Own(), num_train_epochs=3)
    Own.read.clear()
    trainer.train()
    assert 2.5 * SIZE <= len(Own.read) < 3 * SIZE
    assert set(trainer.ledger.ids.tolist()) == set(Own.sample_ids)


class Repaired(torch.utils.data.Dataset):
    """Pairs whose captions are wrong at first, a share of them, and right from a moment on."""

    def __init__(self, size: int, rate: float):
        self.right = as_pairs(tiny_models.tiny_pairs(size))
        self.wrong = torch.arange(size) < rate * size
        self.is_repaired = False
        self.sample_ids = list(range(size))

    def __len__(self):
        return len(self.right)

    def __getitem__(self, index):
        row = self.right[index]
        if self.wrong[index] and not self.is_repaired:
            row = {**row, "caption": self.right[(index + 5) % len(self)]["caption"]}
        return row


class Truth(SelectionStrategy):
    """Trains the pairs that were right when they were last seen."""

    name = "truth"
    columns = ("seen_right",)
    first_planned_epoch = 0

    def __init__(self, pairs: Repaired):
        super().__init__()
        self.pairs = pairs

    def plan(self, ledger):
        return ledger.column("seen_right")

    def record(self, sample_id, correlation, ledger, measured=None):
        right = self.pairs.is_repaired | ~self.pairs.wrong[sample_id]
        ledger.write("seen_right", sample_id, right.float())


class Watch(TrainerCallback):
    """Repairs the captions after the first epoch, and notes which of them have been seen to be right."""

    def __init__(self, pairs: Repaired, ledger):
        self.pairs, self.ledger, self.shares = pairs, ledger, []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.shares.append(self.ledger.read("seen_right", self.pairs.wrong.nonzero().flatten()).mean().item())
        self.pairs.is_repaired = True


@pytest.mark.parametrize("m", [2, 4, 8])
def test_a_repaired_pair_comes_back(m, tmp_path):
    """Half of the repaired pairs are known again within about 0.7 m visits: 1 - (1 - 1 / m) ** n = 1 / 2."""
    pairs = Repaired(96, rate=0.5)
    settings = {"selection_rescore_every": m, "num_train_epochs": 2 * m + 1, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, pairs, strategy=Truth(pairs), **settings)
    watch = Watch(pairs, trainer.ledger)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.shares[0] == 0
    half = next(visit for visit, share in enumerate(watch.shares) if share >= 0.5)
    assert half <= math.ceil(0.7 * m) + 1 and watch.shares[-1] > 0.7, watch.shares


@pytest.mark.slow
def test_two_processes_train_on_as_many_pairs_and_know_the_same(tmp_path):
    on_ranks([2], tmp_path, partial(planned_ranks.check_all, tmp_path))


@torch.no_grad()
def test_scores_in_half_precision(tmp_path):
    """The type of the scores is that of the setting, whatever the training has."""
    seen = []
    for scoring_dtype in (None, "bfloat16"):
        trainer = make_trainer(tmp_path, scoring_dtype=scoring_dtype, num_train_epochs=3)
        linear = trainer.model.visual_projection
        hook = linear.register_forward_hook(
            lambda module, given, output: seen.append((torch.is_grad_enabled(), output.dtype))
        )
        with torch.enable_grad():
            trainer.train()
        hook.remove()
    assert set(seen) == {(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("every", [1, 4])
def test_scoring_and_training_run_compiled(every, tmp_path, monkeypatch):
    compiled: list[bool] = []

    def note_runs(graph, inputs, **options):
        def run(*values):
            compiled.append(torch.is_grad_enabled())
            return graph.forward(*values)

        return run

    torch._dynamo.reset()
    torch._dynamo.list_backends()  # fills the registry
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", note_runs)
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "selection_rescore_every": every}
    trainer = make_trainer(tmp_path, num_train_epochs=3, **settings)
    trainer.train()
    assert set(compiled) == {True, False}  # the training step, and the scoring without gradient
    assert trainer.run_metrics({})["selection"]["kept_share"] == 0.5


@pytest.mark.parametrize("strategy", ["small_loss", "noisy_channel"])
def test_weights_of_the_data_multiply(strategy, tmp_path):
    trainer = make_trainer(tmp_path, selection_strategy=strategy)
    batch = trainer.data_collator(trainer.train_dataset.__getitems__([3, 5, 8, 9]))
    batch |= {"inclusion": torch.tensor([1.0, 0.0, 0.5, 0.25]), "planned": torch.tensor([0.9, 0.1, 0.2, torch.nan])}
    batch |= {"unloaded_id": torch.tensor([1]), "unloaded_planned": torch.zeros(1)}
    given = torch.tensor([2.0, 7.0, 0.5, 3.0])
    plain = trainer.selector.select(trainer.model, dict(batch), step=0)
    weighted = trainer.selector.select(trainer.model, {**batch, "given_weight": given}, step=0)
    assert weighted["sample_id"].tolist() == [3, 8, 9] and "given_weight" not in weighted
    own = plain.get("pair_weight", torch.ones(3))
    torch.testing.assert_close(weighted["pair_weight"], own * given[[0, 2, 3]])
    if strategy == "noisy_channel":
        torch.testing.assert_close(own, (wanted := torch.tensor([0.9, 0.4, 2.2])) / wanted.mean())  # 0.55 is the mean
        losses, counts = torch.tensor([0.1, 2.0, 4.0]), torch.full((3,), 64.0)
        torch.testing.assert_close(
            weighted["reweigh"](losses, counts), plain["reweigh"](losses, counts) * given[[0, 2, 3]]
        )
