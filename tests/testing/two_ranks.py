"""Called by test_ranks.py in two processes: trains, compares, and checks what each process must know of the other."""

import os
import signal
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from hf_dissect import DissectTrainer, DissectTrainingArguments, TwinDualEncoder
from hf_dissect.cli import main
from hf_dissect.data import shuffle_captions
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.distributed import Ranks
from hf_dissect.selection import SampleLedger
from hf_dissect.training.interruption import StoppedBySignal
from testing import tiny_models
from testing.tiny_recipe import write_tiny_recipe


def check_exchange() -> None:
    """Gathering knows the order of the ranks, lengths that differ, and nothing at all."""
    accelerator = Accelerator(cpu=True)
    ranks, rank = Ranks(accelerator), accelerator.process_index
    assert not ranks.alone and accelerator.num_processes == 2
    assert ranks.gather_numbers(7 - rank, True).tolist() == [[7, 1], [6, 1]]
    assert ranks.gather(torch.tensor([rank, 10 + rank])).tolist() == [0, 10, 1, 11]
    assert ranks.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    # Rank 0 has one row, rank 1 has three; then rank 0 has none; then neither has any.
    rows = torch.arange(1 + 2 * rank)[:, None] * torch.tensor([1, 10])
    assert ranks.gather_rows(rows, [1, 3]).tolist() == [[0, 0], [0, 0], [1, 10], [2, 20]]
    assert ranks.gather_rows(torch.full((rank,), 0.5), [0, 1]).tolist() == [0.5]
    assert ranks.gather_rows(torch.zeros(0, 2), [0, 0]).tolist() == []
    columns = {"id": torch.arange(rank) - 2**40, "score": torch.full((rank,), 0.1), "kept": torch.full((rank,), True)}
    everywhere = ranks.gather_columns(columns, [0, 1])
    assert {name: column.tolist() for name, column in everywhere.items()} == {
        **{"id": [-(2**40)], "kept": [True]},
        "score": [torch.tensor(0.1).item()],
    }
    assert everywhere["kept"].dtype == torch.bool and everywhere["score"].dtype == torch.float32
    # Rank 0 keeps one of its three rows and sends two; rank 1 sends none.
    values = torch.tensor([[True], [False]] if rank == 0 else []).view(-1, 1).bool()
    received = ranks.send_rows(values, [0, 2] if rank == 0 else [0, 0], [0, 0] if rank == 0 else [2, 0])
    assert received.tolist() == ([] if rank == 0 else [[True], [False]])


def check_global_scope(folder: Path) -> None:
    """Half the candidates a rank and the same record as the one process that test_ranks.py runs on all of them."""
    for strategy, options in GLOBAL_RUNS.items():
        trainer = global_trainer(folder / strategy, options, strategy=strategy, batch_size=8)
        trainer.train()
        check_equal(trainer)


GLOBAL_RUNS = {"dissect": {"variant": "momentum"}, "small_loss": {}, "gsc": {}, "random": {}}


def check_soft_labels(folder: Path) -> None:
    """Both processes end with the labels of the one process that test_ranks.py runs on the candidates of both."""
    for dual in (False, True):
        trainer = soft_label_trainer(folder / f"dual-{dual}", batch_size=8, dual=dual)
        trainer.train()
        check_equal(trainer)
        trainer.ledger.save(folder / f"dual-{dual}" / f"ledger-{trainer.ranks.own}.safetensors")


def soft_label_trainer(folder: Path, *, batch_size: int, dual: bool) -> DissectTrainer:
    model, processor = tiny_models.tiny_clip()
    if dual:
        model = TwinDualEncoder.of(model, tiny_models.tiny_clip(seed=1)[0])
    folder.mkdir(parents=True, exist_ok=True)
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25),
        args=DissectTrainingArguments(
            str(folder),
            selection_strategy="none",
            gsc={"gamma": 0.5, "dual": dual},
            ddp_find_unused_parameters=False,  # so that no parameter may be without a gradient
            per_device_train_batch_size=batch_size,
            num_train_epochs=3,
            optim="sgd",
            learning_rate=0.05,
            save_strategy="no",
            save_run_folder=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )


def global_trainer(folder: Path, options: dict, *, strategy: str, batch_size: int) -> DissectTrainer:
    model, processor = tiny_models.tiny_clip()
    pairs = shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25)
    rows = pairs.to_list()
    rows[7]["caption"] = None  # a candidate less for one rank
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=type(pairs).from_list(rows, features=pairs.features),
        args=DissectTrainingArguments(
            str(folder),
            selection_strategy=strategy,
            selection_options=options,
            selection_scope="global",
            record_selection=True,
            per_device_train_batch_size=batch_size,
            max_steps=9,
            max_bad_fraction=0.1,
            learning_rate=1e-3,
            save_strategy="no",
            save_run_folder=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )


def check_evaluation(folder: Path) -> None:
    """Each rank embeds the images and captions of its own pairs once, and both find the figures of passes over all."""
    model, processor = tiny_models.tiny_clip()
    arguments = DissectTrainingArguments(
        str(folder), per_device_eval_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True
    )
    pairs = tiny_models.tiny_pairs(7, captions_per_image=5)  # 35 pairs, so that one rank gets some of them again
    trainer = DissectTrainer(model=model, processing_class=processor, eval_dataset=pairs, args=arguments)
    embedded: list[int] = []
    hook = model.vision_model.register_forward_hook(lambda module, inputs, output: embedded.append(len(output[1])))
    figures, scores = trainer.evaluate(), trainer.score_pairs(pairs)
    hook.remove()
    assert sum(embedded) < 35, "for evaluation and scores together"
    assert len(scores["correlation"]) == len(set(scores["sample_id"].tolist())) == 35
    trainer.encoder = lambda model, batch: model(**forward_inputs(model, batch))
    trainer.encoder.remember = nullcontext
    expected = trainer.evaluate()
    for name in ("eval_loss", "eval_recall_sum"):
        assert abs(figures[name] - expected[name]) < 1e-5
    assert trainer.ranks.gather_objects(figures["eval_recall_sum"]) == [figures["eval_recall_sum"]] * 2


def check_stream(folder: Path) -> None:
    """Two ranks with a data worker each see every pair of a pass once; a request to end on one rank ends both."""
    model, processor = tiny_models.tiny_clip()
    pairs = tiny_models.tiny_pairs(48).add_column("key", list(range(48)))
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=pairs.to_iterable_dataset(num_shards=4),
        args=DissectTrainingArguments(
            str(folder),
            selection_strategy="random",
            id_column="key",
            shuffle_buffer=5,
            per_device_train_batch_size=4,
            dataloader_num_workers=1,
            record_selection=True,
            max_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    rank = trainer.ranks.own

    class EndsTheSecondRank(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(EndsTheSecondRank())
    try:
        trainer.train()
    except StoppedBySignal as stop:
        assert stop.code == 143 and stop.checkpoint == str(folder / "checkpoint-9")
    assert trainer.state.global_step == 9  # the ranks talk before a step: the request of step 8 ends the next one
    trainer.selector.trace.close()
    if rank == 0:
        rows = pq.read_table(folder / "selection.parquet").to_pandas()
        first_pass = rows[rows.step < 6].sample_id  # 6 steps x 2 ranks x 4 candidates
        assert sorted(first_pass) == list(range(48))


def check_other_number_of_processes(folder: Path) -> None:
    """Go on, at the same epoch, from the checkpoint that one process wrote; its ledger is kept."""
    trainer = global_trainer(folder, {"variant": "momentum"}, strategy="dissect", batch_size=16)
    trainer.args.max_steps, trainer.args.num_train_epochs = -1, 3
    checkpoint = str(folder / "checkpoint-6")
    before = SampleLedger(64)
    before.load(Path(checkpoint) / "ledger.safetensors")

    class LooksAtTheStart(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            assert state.global_step == 3 and state.max_steps == 6  # was 6 of 12, with half the candidates a step
            assert (
                trainer.ledger.column("correlation").nan_to_num(-1).equal(before.column("correlation").nan_to_num(-1))
            )
            assert trainer.lr_scheduler.last_epoch == 3
            assert trainer.optimizer.param_groups[0]["lr"] == 1e-3 * 3 / 6

    trainer.add_callback(LooksAtTheStart())
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 6 and trainer.selector.epoch == 2
    check_equal(trainer)


def check_training(folder: Path) -> None:
    """Both processes end with the same ledger and weights, and the record holds the candidates of both."""
    model, processor = tiny_models.tiny_clip()
    pairs = shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25)
    rows = pairs.to_list()
    rows[7]["caption"] = None  # one rank has a candidate less than the other when it meets this row
    trainer = DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=type(pairs).from_list(rows, features=pairs.features),
        eval_dataset=tiny_models.tiny_pairs(9, seed=1),
        args=DissectTrainingArguments(
            str(folder),
            per_device_train_batch_size=8,
            num_train_epochs=3,
            record_selection=True,
            max_bad_fraction=0.1,
            logging_steps=2,
            learning_rate=1e-3,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    trainer.train()
    check_equal(trainer)
    seen = trainer.ledger.column("history").isfinite()
    assert seen.sum() == 63 and not seen[7]
    # Nine evaluation rows do not divide by two: none may be counted twice.
    assert trainer.evaluate()["eval_image_to_text_R@10"] == 100
    if trainer.is_world_process_zero():
        check_record(folder)


def check_equal(trainer: DissectTrainer) -> None:
    weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    for name, values in {
        **{name: trainer.ledger.column(name) for name in trainer.ledger.columns},
        "weights": weights,
    }.items():
        both = trainer.ranks.gather(values.float().nan_to_num(-1)[None])
        assert torch.equal(both[0], both[1]), f"{name} differs between the processes"


def check_adapter(folder: Path, variant: str) -> None:
    """A MoLA adapter ends equal on both processes, its router decorrelated over the pairs of both."""
    model, processor = tiny_models.tiny_clip()
    pairs = tiny_models.tiny_pairs(64)
    torch.manual_seed(0)
    trainer = DissectTrainer(
        model=tiny_models.with_mola(model, variant, train_base="all", init_weights=False),
        processing_class=processor,
        train_dataset=pairs.add_column("task", [row // 2 % 2 for row in range(64)]),
        args=DissectTrainingArguments(
            str(folder),
            task_column="task",
            per_device_train_batch_size=8,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            selection_options={"variant": "momentum"},
            logging_steps=2,
            learning_rate=1e-3,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    before = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    trainer.train()
    check_equal(trainer)
    assert not torch.equal(before, torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
    logged = [entry["decorrelation_loss"] for entry in trainer.state.log_history if "decorrelation_loss" in entry]
    assert len(logged) == (3 if variant == "router" else 0)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    check_equal(trainer)
    assert (folder / "base_model" / "model.safetensors").is_file()


def check_record(folder: Path) -> None:
    rows = pq.read_table(folder / "selection.parquet").to_pandas()
    assert len(rows) == 3 * 63 and set(rows.step) == set(range(12))
    for _, part in rows.groupby("epoch"):
        assert sorted(part.sample_id) == [i for i in range(64) if i != 7]
    assert rows.groupby("step").size().isin([15, 16]).all() and rows.groupby("step").kept.sum().isin([7, 8]).all()


def check_all(place: Path) -> None:
    check_exchange()
    check_evaluation(place / "evaluation")
    check_training(place / "trainer")
    for variant in ("router", "grad"):
        check_adapter(place / variant, variant)
    check_global_scope(place / "global")
    check_soft_labels(place / "labels")
    check_stream(place / "stream")
    check_other_number_of_processes(place / "one-process")
    rank = Accelerator().process_index
    recipe = write_tiny_recipe(place / f"tiny-{rank}.yaml", training={"max_steps": 2})
    command = ["compare", str(recipe), "--strategies", "none,dissect", "--output-dir", str(place / "compared")]
    with open(place / f"printed-{rank}.txt", "w") as printed, redirect_stdout(printed):
        assert main(command) == 0
