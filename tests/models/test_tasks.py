"""Tasks of the pairs: on their way to the experts of a MoLA adapter, and into the decorrelation of its router."""

import logging

import pytest
import torch
from datasets import ClassLabel, Dataset
from testing import tiny_models
from testing.tiny_models import Wrapper, with_lora, with_mola

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.data import as_pairs
from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.data.tasks import number_tasks_as_saved, save_task_names
from hf_dissect.models.tasks import Decorrelation
from hf_dissect.mola import mola_routing

FAMILIES = ["tiny_clip", "tiny_siglip", "tiny_dual_encoder"]


def pairs_with_tasks(num_rows: int = 64, seed: int = 0, tasks=(0, 1)) -> Dataset:
    pairs = tiny_models.tiny_pairs(num_rows, seed=seed)
    return pairs.add_column("task", [tasks[row % len(tasks)] for row in range(num_rows)])


def make_trainer(folder, variant="grad", family="tiny_clip", train=None, adapter=None, **settings) -> DissectTrainer:
    model, processor = getattr(tiny_models, family)()
    torch.manual_seed(0)
    common = dict(per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=2, report_to="none", max_steps=6)
    return DissectTrainer(
        model=with_mola(model, variant, **(adapter or {})),
        processing_class=processor,
        train_dataset=pairs_with_tasks() if train is None else train,
        eval_dataset=pairs_with_tasks(32, seed=1),
        args=DissectTrainingArguments(
            str(folder),
            **{**common, "task_column": "task", "disable_tqdm": True, "save_run_folder": False, **settings},
        ),
    )


def forwards_of(trainer: DissectTrainer) -> list[torch.Tensor | None]:
    """Filled with the `task_ids` of each forward pass of the whole model."""
    seen = []
    trainer.model.get_base_model().register_forward_hook(
        lambda *_: seen.append(mola_routing(trainer.model).passes.thread.last.task_ids), with_kwargs=False
    )
    return seen


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *((family, "dissect") for family in FAMILIES),
        *(("tiny_clip", name) for name in ("random", "small_loss", "none")),
    ],
)
def test_each_pair_trains_the_expert_of_its_task(family, strategy, tmp_path):
    only_first = pairs_with_tasks(tasks=(0,))
    trainer = make_trainer(
        tmp_path, family=family, train=only_first, selection_strategy=strategy, scoring_batch_size=6, weight_decay=0.0
    )
    experts = {name: part for name, part in trainer.model.named_parameters() if ".mola_B." in name}
    before = {name: part.detach().clone() for name, part in experts.items()}
    trainer.train()
    moved = {name: (part - before[name]).abs().amax((1, 2)) for name, part in experts.items()}
    assert moved and all(change[1] == 0 for change in moved.values())
    assert max(change[0] for change in moved.values()) > 1e-4


def test_the_tasks_reach_every_forward_pass(tmp_path):
    trainer = make_trainer(
        tmp_path, selection_strategy="small_loss", scoring_batch_size=6, max_steps=1, check_reload=False
    )
    seen = forwards_of(trainer)
    trainer.train()
    assert [len(tasks) for tasks in seen] == [6, 6, 4, 8]  # three chunks are scored, half of the pairs trains
    kept = trainer.monitor.run.kept
    assert kept == 8
    seen.clear()
    trainer.evaluate()
    assert torch.cat(seen).tolist() == [0, 1] * 16
    seen.clear()
    trainer.score_pairs(pairs_with_tasks(10))
    assert torch.cat(seen).tolist() == [0, 1] * 5


def test_evaluation_takes_the_task_of_each_pair_and_without_tasks_the_mean_of_the_experts(tmp_path):
    trainer = make_trainer(tmp_path, adapter={"init_weights": False})
    trainer.model.eval()
    rows = pairs_with_tasks(12, seed=2)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(12)])
    told = forward_inputs(trainer.model, batch)
    assert told["task_ids"].tolist() == [0, 1] * 6
    with torch.no_grad():
        own = trainer.model(**told).image_embeds
        mean = trainer.model(**{name: value for name, value in told.items() if name != "task_ids"}).image_embeds
    assert (own - mean).abs().max() > 1e-4
    with_tasks = trainer.evaluate(rows)
    trainer.args.task_column = None
    without = trainer.evaluate(rows.remove_columns("task"))
    assert with_tasks["eval_loss"] != without["eval_loss"]


def test_other_models_are_not_told_of_tasks(tmp_path):
    batch = {"pixel_values": torch.zeros(2, 3), "task_id": torch.tensor([0, 1])}
    plain, lora, mola = (tiny_models.tiny_clip()[0] for _ in range(3))
    loss, decorrelation = torch.tensor(2.0), Decorrelation()
    for model in (plain, with_lora(lora), Wrapper(with_mola(mola, decorrelation_weight=0.0))):
        assert set(forward_inputs(model, batch)) == {"pixel_values"}
        assert decorrelation.add_to(loss, model, batch) is loss and decorrelation.pop_logs() == {}


def test_training_without_tasks_is_refused_before_it_starts(tmp_path):
    with pytest.raises(ValueError, match="train_dataset has no tasks, .*'grad'.*task_column"):
        make_trainer(tmp_path, task_column=None)
    stream = pairs_with_tasks().to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset has no tasks"):
        make_trainer(tmp_path, train=stream, task_column=None)
    rows = [dict(pair) for pair in as_pairs(tiny_models.tiny_pairs(16))]

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    with pytest.raises(ValueError, match="train_dataset has no tasks"):
        make_trainer(tmp_path, train=Pairs())
    make_trainer(tmp_path, task_column=None, adapter={"default_task": 0})


@pytest.mark.parametrize(("tasks", "wrong"), [((0, 1, 2), 2), ((-1, 0), -1)])
def test_tasks_beyond_the_experts_are_refused_before_training(tasks, wrong, tmp_path):
    message = rf"train_dataset has task {wrong}, but the adapter has num_experts=2, .*tasks 0 to 1"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, train=pairs_with_tasks(tasks=tasks))
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=message.replace("train", "eval")):
        trainer.evaluate(pairs_with_tasks(tasks=tasks))


def test_a_stream_is_trained_and_refused_when_a_task_has_no_expert(tmp_path):
    trainer = make_trainer(tmp_path, train=pairs_with_tasks().to_iterable_dataset())
    trainer.train()
    trainer = make_trainer(tmp_path, train=pairs_with_tasks(tasks=(0, 5)).to_iterable_dataset())
    with pytest.raises(ValueError, match="task_ids from 0 to 5.*has the tasks 0 to 1"):
        trainer.train()


def test_bad_rows_keep_their_task_and_do_not_train(tmp_path):
    rows = pairs_with_tasks(64).to_list()
    for row in (3, 17):
        rows[row]["caption"] = None
    train = Dataset.from_list(rows, features=pairs_with_tasks(1).features)
    trainer = make_trainer(tmp_path, train=train, max_bad_fraction=0.1, max_steps=4)
    trainer.train()
    assert sorted(trainer.bad_rows.reasons) == [3, 17]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_is_decorrelated_in_training_and_not_in_evaluation(family, tmp_path):
    trainer = make_trainer(tmp_path, "router", family, selection_strategy="none")
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(8)])
    losses = {}
    for mode in (True, False):
        model = trainer.model.train(mode)
        torch.manual_seed(1)
        losses[mode] = trainer.compute_loss(model, batch).item()
        torch.manual_seed(1)
        outputs = model(**forward_inputs(model, batch))
        plain = trainer.objective.contrastive_loss(outputs).item()
        extra = mola_routing(model).decorrelation_loss(batch["task_id"]).item()
        assert extra > 0.01
        assert losses[mode] == pytest.approx(plain + (extra if mode else 0), rel=1e-5)
    trainer.objective.decorrelation.pop_logs()
    before = {name: part.detach().clone() for name, part in trainer.model.named_parameters() if "mola_router" in name}
    trainer.train()
    logged = [entry["decorrelation_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all(0 < value < 1 for value in logged)
    assert any("eval" in key for key in trainer.evaluate()) and not trainer.objective.decorrelation.pop_logs()
    moved = [
        name for name, part in trainer.model.named_parameters() if name in before and (part != before[name]).any()
    ]
    assert moved


def test_the_router_trains_without_tasks_as_well(tmp_path):
    trainer = make_trainer(tmp_path, "router", task_column=None)
    trainer.train()
    assert not any("decorrelation_loss" in entry for entry in trainer.state.log_history)


def test_scoring_does_not_move_the_statistics_of_the_router(tmp_path):
    trainer = make_trainer(tmp_path, "router")
    trainer.model.train()
    statistics = {name: value.clone() for name, value in trainer.model.named_buffers() if "mola_router" in name}
    assert any("running_mean" in name for name in statistics)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(16)])
    trainer.selector.score(trainer.model, batch, batch["sample_id"], torch.arange(16))
    assert all(torch.equal(value, trainer.model.get_buffer(name)) for name, value in statistics.items())
    trainer.compute_loss(trainer.model, batch)
    assert any(not torch.equal(value, trainer.model.get_buffer(name)) for name, value in statistics.items())


def test_names_of_tasks_are_numbered_as_in_the_training_data(tmp_path, caplog):
    train = as_pairs(pairs_with_tasks(tasks=("art", "photo")), task="task")
    assert train.task_names == ["art", "photo"] and train[1]["task_id"] == 1
    trainer = make_trainer(tmp_path, train=pairs_with_tasks(tasks=("art", "photo")))
    seen = forwards_of(trainer)
    trainer.evaluate(pairs_with_tasks(4, tasks=("photo",)))
    assert torch.cat(seen).tolist() == [1] * 4
    with pytest.raises(ValueError, match="'sketch' is not a task of the training, which are art, photo"):
        trainer.evaluate(pairs_with_tasks(4, tasks=("sketch",)))
    save_task_names(train, tmp_path)
    photos = as_pairs(pairs_with_tasks(4, tasks=("photo",)), task="task")
    with caplog.at_level(logging.WARNING):
        number_tasks_as_saved(photos, tmp_path / "elsewhere")
    assert "alphabetical order" in caplog.text and photos[0]["task_id"] == 0
    number_tasks_as_saved(photos, tmp_path)
    assert photos[0]["task_id"] == 1 and photos.task_names == ["art", "photo"]
    labels = pairs_with_tasks(4, tasks=(0,)).cast_column("task", ClassLabel(names=["photo", "clip art"]))
    labelled = as_pairs(labels, task="task")
    labelled.number_tasks(["art", "photo"])  # a class that no row has need not be known
    assert labelled[0]["task_id"] == 1
    numbered = as_pairs(pairs_with_tasks(4), task="task")
    number_tasks_as_saved(numbered, tmp_path)
    assert numbered.task_names is None and numbered[1]["task_id"] == 1
