"""Compiled runs: one graph for each length of captions in the step, one in the scoring, and the same run."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from testing import tiny_models
from transformers import AutoModel, CLIPModel

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.training.compiled_model import MOST_GRAPHS, mark_shapes

LENGTHS = (7, 16)
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager", "caption_lengths": [7]}


def pairs_of_many_lengths(num_rows: int = 44, unreadable: tuple[int, ...] = ()) -> Dataset:
    """Pairs whose batches of 8 have a longest caption of 4, 6, 8, ... tokens, and a last batch of 4 pairs."""
    pairs, words = tiny_models.tiny_pairs(num_rows), tiny_models.WORDS
    captions = [
        " ".join(words[(row * 7 + k) % len(words)] for k in range(2 + row // 8 * 2)) for row in range(num_rows)
    ]
    images = [{"bytes": b"damaged" if k in unreadable else pairs[k]["image"]["bytes"]} for k in range(num_rows)]
    rows = {"image": images, "caption": captions, "task": [k % 2 for k in range(num_rows)]}
    return Dataset.from_dict(rows).cast_column("image", pairs.features["image"])


@pytest.fixture
def graphs(monkeypatch) -> list[tuple[bool, int]]:
    """For each graph that is compiled: whether it has gradients, and the length of its captions."""
    compiled: list[tuple[bool, int]] = []

    def note(graph, inputs, **options):
        (tokens,) = [node for node in graph.graph.nodes if node.op == "placeholder" and "input_ids" in node.name]
        compiled.append((torch.is_grad_enabled(), int(tokens.meta["example_value"].shape[1])))
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.list_backends()  # fills the registry
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", note)
    return compiled


def flat_clip() -> CLIPModel:
    """A tiny CLIP with towers of one layer, because each layer is traced in each graph."""
    config = tiny_models.tiny_clip()[0].config
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    torch.manual_seed(0)
    return CLIPModel(config).eval()


def make_trainer(folder: Path, model=None, pairs=None, **settings) -> DissectTrainer:
    processor = tiny_models.tiny_clip()[1]
    defaults = dict(
        selection_strategy="small_loss",
        per_device_train_batch_size=8,
        num_train_epochs=2,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        save_run_folder=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        check_reload=False,
    )
    return DissectTrainer(
        model=flat_clip() if model is None else model,
        processing_class=processor,
        train_dataset=pairs_of_many_lengths() if pairs is None else pairs,
        args=DissectTrainingArguments(str(folder), **{**defaults, **settings}),
    )


def losses_of(trainer: DissectTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def mola(model):
    return tiny_models.with_mola(model, "router", init_weights=False)


CASES = {
    "mola": (mola, {}, 1),
    "mola by task": (lambda model: tiny_models.with_mola(model, "grad"), {"task_column": "task"}, 1),
    "chunks": (None, {"grad_cache_chunk_size": 3, "scoring_batch_size": 5}, 2),
    "bf16": (None, {"bf16": True, "scoring_dtype": "bfloat16"}, 1),
    "lora, unreadable rows": (tiny_models.with_lora, {"max_bad_fraction": 1.0}, 1),
    # Torch fixes the size of a batch of one pair, which is scored alone here.
    "planned loading": (None, {"selection_rescore_every": 3, "num_train_epochs": 3}, 2),
}


SLOW = {"mola", "mola by task"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_one_graph_for_each_length_in_step_and_scoring(case, tmp_path, graphs):
    change, settings, most = CASES[case]
    pairs = pairs_of_many_lengths(unreadable=(1, 9, 10, 17) if "unreadable" in case else ())
    runs = []
    # In half precision, other padding is rounded otherwise.
    same = {"caption_lengths": [7]} if case == "bf16" else {}
    for name, compiled in (("eager", same), ("compiled", COMPILED)):
        model = flat_clip()
        trainer = make_trainer(
            tmp_path / name, model if change is None else change(model), pairs, **settings, **compiled
        )
        trainer.train()
        runs.append(losses_of(trainer))
    assert len(runs[0]) == 6 * trainer.args.num_train_epochs
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=1e-4, atol=1e-5)
    # The number of pairs is 8, 4 or 7 candidates, 4, 2, 3 kept ones, and the chunks of these.
    assert set(graphs) == {(gradient, length) for gradient in (True, False) for length in LENGTHS}
    assert max(Counter(graphs).values()) <= most
    torch.testing.assert_close(trainer.state.log_history[-1]["train_loss"], sum(runs[1]) / len(runs[1]))


def test_a_compiled_run_is_saved_without_traces_and_resumes(tmp_path, graphs):
    settings = {**COMPILED, "save_strategy": "steps", "save_steps": 7, "save_run_folder": True, "check_reload": True}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    num_graphs = len(graphs)
    assert num_graphs == 4
    checkpoint = tmp_path / "whole" / "checkpoint-7"
    for folder in (checkpoint, tmp_path / "whole"):
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == whole.model.state_dict().keys() and not any("_orig" in name for name in weights)
    resumed = make_trainer(tmp_path / "resumed", **{**settings, "save_run_folder": False})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(resumed) == losses_of(whole)
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name
    loaded = AutoModel.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(weight, whole.model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    saved = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert saved["steps"] == 12 and saved["final"] is not None


def test_lengths_without_compiling_and_compiling_without_lengths(tmp_path):
    reached = {}
    for name, settings in {
        "eager": {},
        "lengths": {"caption_lengths": [7]},
        "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
        "any length": {**COMPILED, "caption_lengths": []},
    }.items():
        trainer = make_trainer(tmp_path, **settings)
        shapes = {batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()}
        reached[name] = trainer.data_collator.caption_lengths, shapes
    many = {4, 6, 8, 10, 12, 14}
    assert reached["eager"] == reached["any length"] == ((), many)
    assert reached["lengths"] == ((7, 16), {7, 16}) and reached["compiled"] == ((16,), {16})


def test_a_model_that_is_not_compiled_is_left_alone(tmp_path):
    model, trainer = tiny_models.tiny_clip()[0], make_trainer(tmp_path, caption_lengths=[7])
    prepared = (model, None)
    assert mark_shapes(prepared, trainer.data_collator) is prepared and mark_shapes(model, None) is model
    assert not model._forward_pre_hooks


def test_torch_is_allowed_as_many_graphs_as_a_run_needs(tmp_path, graphs):
    with torch._dynamo.config.patch(recompile_limit=2):
        make_trainer(tmp_path, max_steps=1, **COMPILED).train()
        assert torch._dynamo.config.recompile_limit == MOST_GRAPHS and len(graphs) == 2


def test_lengths_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"caption_lengths=\[99\].*beyond the 16 tokens"):
        make_trainer(tmp_path, caption_lengths=[99])
    with pytest.raises(ValueError, match="caption_lengths=0 is not allowed; allowed: at least 1"):
        DissectTrainingArguments(str(tmp_path), caption_lengths=[8, 0])
