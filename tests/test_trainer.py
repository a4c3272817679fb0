import json
from collections import ChainMap

import pyarrow.parquet as pq
import pytest
import torch
from testing import tiny_models
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from hf_dissect import DissectTrainer, DissectTrainingArguments, SampleLedger
from hf_dissect.data import as_pairs, shuffle_captions
from hf_dissect.data.pairs import PAIR_KEYS
from hf_dissect.data_collator import SelectionCollator
from hf_dissect.selection import STRATEGIES, Selection, SelectionStrategy
from hf_dissect.training.non_finite import NonFiniteLossError

COMMON = dict(per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=2, report_to="none", disable_tqdm=True)


def arguments(folder, **settings) -> DissectTrainingArguments:
    return DissectTrainingArguments(str(folder), **{**COMMON, "selection_warmup_epochs": 1, **settings})


def make_trainer(folder, family="tiny_clip", train=None, strategy=None, **settings) -> DissectTrainer:
    model, processor = getattr(tiny_models, family)()
    compares = getattr(STRATEGIES.get(settings.get("selection_strategy")), "reference", "")
    train = shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25) if train is None else train
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=train,
        eval_dataset=tiny_models.tiny_pairs(32, seed=1),
        args=arguments(folder, **settings),
        strategy=strategy,
        reference_model=getattr(tiny_models, family)(seed=9)[0] if compares else None,
    )


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip", "tiny_dual_encoder"])
@pytest.mark.parametrize("workers", [0, 2])
def test_none_gives_the_weights_of_the_plain_trainer(family, workers, tmp_path):
    if workers and family != "tiny_clip":
        pytest.skip("workers do not depend on the family")
    settings = dict(**COMMON, max_steps=50, dataloader_num_workers=workers, save_strategy="no")
    ours = DissectTrainingArguments(
        str(tmp_path / "ours"), selection_strategy="none", save_run_folder=False, **settings
    )
    model, processor = getattr(tiny_models, family)()
    data = tiny_models.tiny_pairs(80)
    trainer = DissectTrainer(model=model, processing_class=processor, train_dataset=data, args=ours)
    collate = trainer.data_collator
    trainer.train()

    model, _ = getattr(tiny_models, family)()
    plain = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path / "plain"), remove_unused_columns=False, **settings),
        train_dataset=as_pairs(data),
        data_collator=PlainCollator(collate),
    )
    plain.train()
    assert (weights(trainer) - weights(plain)).abs().max() < 1e-6


class PlainCollator:
    """What a user of the plain Trainer passes: the model's inputs and `return_loss`."""

    def __init__(self, collate: SelectionCollator):
        self.collate = collate

    def __call__(self, rows):
        batch = self.collate(rows)
        return {**{key: value for key, value in batch.items() if key not in PAIR_KEYS}, "return_loss": True}


@pytest.mark.parametrize("family", ["tiny_clip", "tiny_siglip", "tiny_dual_encoder"])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_trains_every_family(family, strategy, tmp_path):
    trainer = make_trainer(
        tmp_path, family, selection_strategy=strategy, max_steps=10, scoring_batch_size=6, save_run_folder=False
    )
    before = weights(trainer)
    trainer.train()
    assert (weights(trainer) - before).abs().max() > 1e-4
    seen = trainer.ledger.column("correlation")
    assert seen.isfinite().sum() == 64 if strategy not in ("random", "coreset") else seen.isfinite().sum() > 30
    kept = [entry["selection_kept_share"] for entry in trainer.state.log_history if "loss" in entry]
    # scan warms up on all pairs and marks them in the second of 2.5 epochs; info_batch ends on all of them.
    expected = {"scan": [1.0] * 4 + [0.875], "info_batch": [0.5] * 4 + [1.0]}
    assert kept == pytest.approx(expected.get(strategy, [1.0 if trainer.strategy.keeps_all else 0.5] * 5))


def test_run_folder_holds_all_that_is_promised(tmp_path):
    trainer = make_trainer(
        tmp_path, num_train_epochs=3, record_selection=True, save_strategy="epoch", eval_strategy="epoch"
    )
    trainer.train()
    model = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer("red")["input_ids"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["strategy"] == "dissect" and metrics["steps"] == 12
    assert 0 < metrics["final"]["recall_sum"] <= 600
    assert 0 <= metrics["final"]["noise_detection_auroc"] <= 1
    assert metrics["selection"]["noise_candidates"] == pytest.approx(0.25)
    assert metrics["times"]["scoring_s"] > 0 and metrics["versions"]["torch"] == torch.__version__
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "README.md").read_text().startswith("---\n")
    for folder in (tmp_path, *tmp_path.glob("checkpoint-*")):
        ledger = SampleLedger(64, columns=("correlation", "history"))
        assert ledger.load(folder / "ledger.safetensors")["strategy"] == "dissect"
    assert ledger.column("history").isfinite().all()
    assert len(list(tmp_path.glob("checkpoint-*/trainer_state.json"))) == 3


def test_a_truth_without_mismatched_pairs_has_no_auroc(tmp_path):
    pairs = tiny_models.tiny_pairs(32)
    settings = {"clean_column": "all_match", "selection_strategy": "random", "max_steps": 1, "save_run_folder": False}
    model, processor = tiny_models.tiny_clip()
    trainer = DissectTrainer(
        model,
        arguments(tmp_path, **settings),
        train_dataset=pairs.add_column("all_match", [True] * len(pairs)),
        processing_class=processor,
    )
    trainer.train()
    figures = dict(ChainMap(*trainer.compute_figures(None, retrieval=False)))
    assert figures["noise_detection_auroc"] is None and figures["noise_detection_num_scored"] == 32
    assert "test_noise_detection_auroc" not in trainer.state.log_history[-1]


def test_selection_is_recorded_row_by_row(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=3, record_selection=True, save_run_folder=False)
    trainer.train()
    rows = pq.read_table(tmp_path / "selection.parquet").to_pandas()
    assert {name: str(kind) for name, kind in rows.dtypes.items()} == {
        "epoch": "int32",
        "step": "int64",
        "sample_id": "int64",
        "correlation": "float32",
        "kept": "bool",
    }
    assert len(rows) == 3 * 64 and rows.step.tolist() == sorted(rows.step) and set(rows.step) == set(range(12))
    assert rows.groupby("step").kept.sum().eq(8).all() and rows.groupby("step").size().eq(16).all()
    for epoch, part in rows.groupby("epoch"):
        assert sorted(part.sample_id) == list(range(64)) and set(part.step) == set(range(4 * epoch, 4 * epoch + 4))
    # From the second epoch on, the differential to the first epoch's scores decides.
    history = rows[rows.epoch == 0].set_index("sample_id").correlation
    for _, part in rows[rows.epoch > 0].groupby("step"):
        fall = history[part.sample_id].to_numpy() - part.correlation.to_numpy()
        assert fall[part.kept].min() >= fall[~part.kept].max()


def test_scoring_leaves_the_training_random_stream_alone(tmp_path):
    found = []
    for recorded in (False, True):  # recording scores every candidate, which random selection does not need
        trainer = make_trainer(
            tmp_path / str(recorded),
            "tiny_dual_encoder",
            selection_strategy="random",
            max_steps=6,
            record_selection=recorded,
            save_run_folder=False,
        )
        trainer.train()
        found.append(weights(trainer))
        assert (trainer.times["scoring"] > 0) == recorded
    assert trainer.model.text_model.config.hidden_dropout_prob > 0  # so that the stream matters
    assert torch.equal(*found)


def test_scoring_runs_in_evaluation_mode_and_restores_the_mode(tmp_path):
    trainer = make_trainer(tmp_path, "tiny_dual_encoder")
    trainer.model.train()
    trainer.model.vision_model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    first = trainer.selector.score(trainer.model, batch, batch["sample_id"], torch.arange(8))
    second = trainer.selector.score(trainer.model, batch, batch["sample_id"], torch.arange(8))
    assert torch.equal(first.image_embeds, second.image_embeds) and torch.equal(first.text_embeds, second.text_embeds)
    assert trainer.model.training and trainer.model.text_model.training and not trainer.model.vision_model.training


def test_scoring_in_chunks_equals_scoring_at_once(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    at_once = trainer.selector.score(trainer.model, batch, batch["sample_id"], torch.arange(16))
    trainer.selector.scoring_batch_size = 5
    chunked = trainer.selector.score(trainer.model, batch, batch["sample_id"], torch.arange(16))
    assert torch.allclose(at_once.correlation, chunked.correlation, atol=1e-4)
    assert torch.allclose(at_once.loss, chunked.loss, atol=1e-5)


def test_weights_of_a_strategy_reach_the_loss(tmp_path):
    class FirstHalf(SelectionStrategy):
        name = "first_half"

        def select(self, scores, ledger, k):
            return Selection(torch.arange(k), weights=torch.zeros(k))

    trainer = make_trainer(tmp_path, strategy=FirstHalf(), max_steps=3, save_run_folder=False, weight_decay=0.0)
    before = weights(trainer)
    trainer.train()
    assert torch.equal(before, weights(trainer))


def test_logit_scale_is_clamped(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_run_folder=False)
    with torch.no_grad():
        trainer.model.logit_scale.fill_(9.0)
    trainer.train()
    assert float(trainer.model.logit_scale) <= 4.6052


def test_gradient_accumulation_is_a_mean_over_micro_batches(tmp_path):
    logged = []
    for accumulation in (1, 4):
        trainer = make_trainer(
            tmp_path / str(accumulation),
            selection_strategy="none",
            learning_rate=0.0,
            gradient_accumulation_steps=accumulation,
            max_steps=4 // accumulation,
            logging_steps=4 // accumulation,
            save_run_folder=False,
            max_grad_norm=0.0,
        )
        trainer.train()
        logged.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_caching_changes_nothing_but_the_memory(accumulation, tmp_path):
    ends, logs = [], []
    for chunk_size in (None, 3):  # 8 pairs are kept
        trainer = make_trainer(
            tmp_path / str(chunk_size),
            selection_strategy="random",  # unscored: the training pass itself tells the correlations
            optim="sgd",
            learning_rate=0.1,
            grad_cache_chunk_size=chunk_size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            logging_steps=1,
            save_run_folder=False,
        )
        trainer.train()
        ends.append((weights(trainer), trainer.ledger.column("correlation")))
        logs.append(
            [entry[key] for entry in trainer.state.log_history for key in ("loss", "grad_norm") if key in entry]
        )
    for whole, chunked in zip(*ends, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and len(logs[0]) == 8


def test_gradient_caching_decorrelates_the_router_over_the_whole_batch(tmp_path):
    logged = []
    for chunk_size in (None, 5):
        model, processor = tiny_models.tiny_clip()
        torch.manual_seed(0)
        trainer = DissectTrainer(
            # The router that reads pixels has batch norm, which sees a chunk where it would see the batch.
            model=tiny_models.with_mola(model, "router", init_weights=False, router_input="embeddings"),
            processing_class=processor,
            train_dataset=tiny_models.tiny_pairs(64).add_column("task", [row // 2 % 2 for row in range(64)]),
            args=arguments(
                tmp_path / str(chunk_size),
                selection_strategy="none",
                optim="sgd",
                learning_rate=0.1,
                grad_cache_chunk_size=chunk_size,
                task_column="task",
                max_steps=3,
                logging_steps=1,
                save_run_folder=False,
            ),
        )
        trainer.train()
        keys = ("loss", "grad_norm", "decorrelation_loss")
        logged.append([entry[key] for entry in trainer.state.log_history for key in keys if key in entry])
    assert logged[0] == pytest.approx(logged[1], rel=1e-3) and len(logged[0]) == 9


def test_gradient_caching_is_refused_where_a_step_has_one_backward_pass(tmp_path):
    with pytest.raises(ValueError, match="grad_cache_chunk_size=4 .* optim lomo does not allow"):
        make_trainer(tmp_path, grad_cache_chunk_size=4, optim="lomo")


@pytest.mark.parametrize("strategy", ["dissect", "random"])
def test_resume_chooses_and_ends_as_the_uninterrupted_run(strategy, tmp_path):
    settings = dict(
        selection_strategy=strategy, num_train_epochs=3, record_selection=True, save_strategy="steps", save_steps=5
    )
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", **settings)
    rows = pq.read_table(tmp_path / "whole" / "selection.parquet")
    (tmp_path / "whole" / "selection.parquet").unlink()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert torch.equal(weights(whole), weights(resumed))
    for name in whole.ledger.columns:
        assert torch.equal(whole.ledger.column(name), resumed.ledger.column(name))
    later = rows.filter(rows["step"].to_numpy() >= 5)
    assert pq.read_table(tmp_path / "whole" / "selection.parquet").equals(later)


def test_not_a_number_in_the_loss_stops_before_the_weights_change(tmp_path):
    trainer = make_trainer(tmp_path, selection_strategy="none", max_steps=8, save_strategy="steps", save_steps=2)

    class Poison(torch.nn.Module):
        def forward(self, values):
            return values * torch.nan if trainer.state.global_step == 3 else values

    trainer.model.text_projection = torch.nn.Sequential(trainer.model.text_projection, Poison())
    with pytest.raises(NonFiniteLossError, match=r"At step 3 the loss is not finite.*checkpoint-2"):
        trainer.train()
    assert weights(trainer).isfinite().all()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_evaluation_counts_several_captions_of_an_image_once(tmp_path):
    model, processor = tiny_models.tiny_clip()
    data = tiny_models.tiny_pairs(12, captions_per_image=3)
    trainer = DissectTrainer(
        model=model, processing_class=processor, eval_dataset=data, args=arguments(tmp_path, num_train_epochs=2)
    )
    figures = trainer.evaluate()
    assert len(trainer.eval_dataset) == 36
    # 12 images, 3 captions each: an image is among 36 captions, a caption among 12 images.
    assert (
        1 <= figures["eval_image_to_text_median_rank"] <= 34 and 1 <= figures["eval_text_to_image_median_rank"] <= 12
    )


@pytest.mark.parametrize("family", ["tiny_align", "tiny_chinese_clip", "tiny_siglip2"])
def test_further_families_train_with_selection(family, tmp_path):
    trainer = make_trainer(tmp_path, family, selection_options={"variant": "momentum"}, max_steps=6)
    before = weights(trainer)
    trainer.train()
    assert (weights(trainer) - before).abs().max() > 1e-4
    assert json.loads((tmp_path / "metrics.json").read_text())["final"]["recall_sum"] > 0


def test_mixed_precision_scores_and_trains(tmp_path):
    trainer = make_trainer(tmp_path, selection_options={"variant": "momentum"}, max_steps=6, bf16=True, use_cpu=True)
    trainer.train()
    scores = trainer.ledger.column("correlation")
    assert scores.dtype == torch.float32 and scores.isfinite().sum() == 64
    assert weights(trainer).dtype == torch.float32 and weights(trainer).isfinite().all()


def test_an_adapter_trains_resumes_and_is_what_the_run_folder_holds(tmp_path):
    model, processor = tiny_models.tiny_clip()
    trainer = DissectTrainer(
        model=tiny_models.with_lora(model),
        processing_class=processor,
        train_dataset=tiny_models.tiny_pairs(64),
        args=arguments(tmp_path, num_train_epochs=2, save_strategy="epoch"),
    )
    trainer.train(resume_from_checkpoint=None)
    trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()


def test_a_custom_strategy_writes_its_own_column(tmp_path):
    class Alternate(SelectionStrategy):
        name = "alternate"
        columns = ("visits",)

        def select(self, scores, ledger, k):
            visits = ledger.read("visits", scores.sample_id).nan_to_num(0)
            return Selection(visits.argsort(stable=True)[:k].sort().values)

        def record(self, sample_id, correlation, ledger, measured=None):
            ledger.write("visits", sample_id, ledger.read("visits", sample_id).nan_to_num(0) + 1)

    trainer = make_trainer(tmp_path, strategy=Alternate(), num_train_epochs=3)
    trainer.train()
    assert trainer.ledger.column("visits").tolist() == [3.0] * 64


def test_passes_of_a_stream_are_its_epochs(tmp_path):
    stream = tiny_models.tiny_pairs(64).to_iterable_dataset()
    trainer = make_trainer(tmp_path, train=stream, max_steps=12, record_selection=True, selection_warmup_epochs=2)
    trainer.train()
    rows = pq.read_table(tmp_path / "selection.parquet").to_pandas()
    assert rows.groupby("epoch").step.unique().map(list).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    # Frozen after the second pass, which is the last of the warm-up.
    history = trainer.ledger.read("history", torch.tensor(rows.sample_id[:64].to_numpy()))
    second = rows[rows.epoch == 1].set_index("sample_id").correlation
    assert history.tolist() == second[rows.sample_id[:64]].tolist()
