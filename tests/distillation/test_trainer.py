"""Runs of the whole distillation: they learn, resume bit for bit, and leave a student that needs nothing else."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from testing.tiny_modalities import CLASSES, tiny_auxiliaries, tiny_columns, tiny_student, tiny_trainer, weights_of
from transformers import TrainerCallback

from hf_dissect.data.bad_rows import TooManyBadRows
from hf_dissect.distillation import METHODS, DistillationTrainer
from hf_dissect.distillation.diagnostics import Watch
from hf_dissect.training.non_finite import NonFiniteLossError

EVERYTHING = {"hinton": 0.5, "contrastive": 0.5}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_logs_its_terms(method, tmp_path):
    trainer = tiny_trainer(
        tmp_path, evaluation=tiny_columns(16, seed=1), method=method, max_steps=40, logging_steps=10
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = asdict(trainer.args.weights)
    assert {name.removeprefix("loss_") for name in logs[0] if name.startswith("loss_")} == {
        name for name, weight in weights.items() if weight
    }
    assert logs[-1]["loss_student_task"] < logs[0]["loss_student_task"]
    assert ("information_student" in logs[0]) == bool(weights["information_student"] or weights["contrastive"])
    assert ("discriminator_accuracy" in logs[0]) == (trainer.adversary is not None) == (method == "amid")
    metrics = trainer.evaluate()
    assert metrics["eval_student_accuracy"] > 0.6 and metrics["eval_retrieval_R@1"] > 0.8
    assert ("eval_teacher_accuracy" in metrics) == (method != "student")


def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path):
    weights = {"information_auxiliary": 0.25, "conditional_entropy": 2.0, **EVERYTHING}
    trainer = tiny_trainer(tmp_path, term_weights=weights, max_steps=1, logging_steps=1)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = sum(weight * log[f"loss_{name}"] for name, weight in asdict(trainer.args.weights).items())
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_weights_of_distillation_rise(tmp_path):
    settings = {"method": "mi_student_only", "term_weights": {"information_student": 2.0}, "weight_warmup": 0.5}
    trainer = tiny_trainer(tmp_path, **settings, max_steps=4, logging_steps=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for log, weight in zip(logs, (0, 1, 2, 2), strict=True):
        tasks = sum(log[f"loss_{name}_task"] for name in ("student", "teacher", "auxiliary"))
        assert log["loss"] == pytest.approx(tasks + weight * log["loss_information_student"], rel=1e-5)


@pytest.mark.parametrize("method, learns", [("crd", False), ("mi_student_only", True)])
def test_whether_the_comparison_trains_the_teacher(method, learns, tmp_path):
    trainer = tiny_trainer(
        tmp_path, method=method, term_weights={"teacher_task": 0, "auxiliary_task": 0}, weight_decay=0.0
    )
    before = [weight.detach().clone() for weight in trainer.model.teacher.fusion.parameters()]
    trainer.train()
    after = list(trainer.model.teacher.fusion.parameters())
    assert learns == any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_all_methods_start_from_the_same_student(tmp_path):
    students = [tiny_trainer(tmp_path, method=method).student.state_dict() for method in METHODS]
    for other in students[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in students[0].items())


class _StopsAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


CASES = {
    "amid": {},
    "everything, bank, accumulation": {
        "term_weights": EVERYTHING,
        "memory_bank": 12,
        "gradient_accumulation_steps": 2,
        "retrieval_weight": 1.0,
        "embedding_size": 5,
    },
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    settings = CASES[case] | {
        "save_strategy": "steps",
        "save_steps": 3,
        "encoder": {"dropout": 0.2, "noise": 0.1, "shift": 1},
    }
    columns = tiny_columns()
    columns["skeleton"][5] = np.nan
    whole = tiny_trainer(tmp_path / "whole", columns, **settings)
    whole.train()
    interrupted = tiny_trainer(tmp_path / "run", columns, **settings)
    interrupted.add_callback(_StopsAt(5))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = tiny_trainer(tmp_path / "run", columns, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert resumed.rows.summary() == whole.rows.summary() and whole.rows.summary()["student_only"] == 1
    times = ("runtime", "per_second", "train_loss")
    logs = [
        [
            {k: v for k, v in entry.items() if not any(part in k for part in times)}
            for entry in trainer.state.log_history
        ]
        for trainer in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    other = tiny_trainer(tmp_path / "run", columns, **(settings | {"teacher_size": 4}))
    with pytest.raises(ValueError, match="other networks"):
        other.train(resume_from_checkpoint=True)


def test_accumulation_is_the_mean_of_its_batches_where_rows_are_alone(tmp_path):
    # Without terms that compare rows with each other, two micro-batches are one batch of both.
    settings = {"method": "hinton", "optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
    one = tiny_trainer(tmp_path, per_device_train_batch_size=8, **settings)
    two = tiny_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    one.train(), two.train()
    assert torch.allclose(weights_of(one), weights_of(two), atol=1e-6)


def test_the_student_loads_without_trainer_teacher_or_auxiliaries(tmp_path):
    trainer = tiny_trainer(tmp_path, save_run_folder=True, evaluation=tiny_columns(8, seed=1), max_steps=2)
    trainer.train()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["final"]["student_accuracy"] >= 0 and "information_student" in metrics["diagnostics"]
    page = (tmp_path / "report.html").read_text()
    assert "Mutual information" in page and "Discriminator" in page
    batch = torch.from_numpy(tiny_columns(4, seed=2)["depth"])
    trainer.student.eval()
    with torch.no_grad():
        expected = trainer.student(pixel_values=batch).logits
    torch.save(batch, tmp_path / "batch.pt")
    script = f"""
import sys, torch
import hf_dissect
from transformers import AutoModel, AutoModelForImageClassification
batch = torch.load({str(tmp_path / "batch.pt")!r}, weights_only=True)
for kind in (AutoModel, AutoModelForImageClassification):
    model = kind.from_pretrained({str(tmp_path)!r}).eval()
    logits = model(pixel_values=batch).logits.tolist()
encoder = AutoModel.from_pretrained({str(tmp_path / "encoder")!r}).eval()
assert torch.equal(encoder(pixel_values=batch).pooler_output, model(pixel_values=batch).features)
names = list(model.state_dict())
assert not any("teacher" in name or "auxiliar" in name or "generator" in name for name in names), names
assert "hf_dissect.distillation.trainer" not in sys.modules and "hf_dissect.trainer" not in sys.modules
print(logits)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)


def test_rows_that_lack_something_are_counted_and_train_what_they_can(tmp_path):
    columns = tiny_columns()
    columns = {name: list(values) for name, values in columns.items()}
    columns["inertial"][0] = None
    columns["skeleton"][1] = np.full((6, 2, 3), np.nan)
    columns["skeleton"][2] = columns["skeleton"][2] * np.array([np.inf, 1, 1])
    columns["inertial"][3] = np.zeros((5, 2))
    columns["depth"][4] = None
    columns["action"][5] = None
    columns["action"][6] = columns["inertial"][6] = None
    trainer = tiny_trainer(tmp_path, columns, max_bad_fraction=0.1, num_train_epochs=1, max_steps=-1)
    trainer.train()
    assert trainer.rows.summary() == {
        "complete": 25,
        "unlabelled": 1,
        "student_only": 4,
        "unusable": 2,
        "reasons": {
            "auxiliary missing": 2,
            "auxiliary not finite": 1,
            "auxiliary unreadable": 1,
            "student missing": 1,
            "label missing": 1,
            "label and auxiliary missing": 1,
        },
        "rows": [0, 1, 2, 3, 4, 5, 6],
        "problems": [
            {"id": 2, "problem": "skeleton: 12 numbers that are not finite", "path": None},
            {"id": 3, "problem": "inertial: an array of shape (5, 2), not (8, 2)", "path": None},
            {"id": 4, "problem": "depth: missing", "path": None},
            {"id": 6, "problem": "inertial: missing", "path": None},
        ],
    }
    assert weights_of(trainer).isfinite().all()
    strict = tiny_trainer(tmp_path, columns, num_train_epochs=1, max_steps=-1)
    with pytest.raises(TooManyBadRows, match=r"max_bad_fraction=0.01.*First problems: (depth|inertial): missing .row"):
        strict.train()


def test_a_row_without_a_label_trains_the_terms_that_need_none(tmp_path):
    columns = tiny_columns(16)
    some = columns | {"action": [*columns["action"][:8], *[None] * 8]}
    without_tasks = {"student_task": 0.0, "teacher_task": 0.0, "auxiliary_task": 0.0}
    trained = []
    for given in (columns, some):
        trainer = tiny_trainer(tmp_path, given, term_weights=without_tasks, max_steps=2, logging_steps=1)
        trainer.train()
        trained.append(weights_of(trainer))
    assert torch.equal(*trained) and trainer.rows.summary()["unlabelled"] == 8


def test_a_row_without_a_label_does_not_touch_the_students_task(tmp_path):
    columns = tiny_columns(16)
    some = columns | {"action": [*columns["action"][:8], *[None] * 8]}
    trained = []
    for given in (some, {name: values[:8] for name, values in columns.items()}):
        trainer = tiny_trainer(tmp_path, given, method="student", max_steps=2, per_device_train_batch_size=16)
        trainer.train()
        trained.append(weights_of(trainer))
    torch.testing.assert_close(*trained)


def test_a_row_without_an_auxiliary_trains_the_students_task_alone(tmp_path):
    columns = tiny_columns(8)
    nothing = {name: list(values) for name, values in columns.items()} | {
        "skeleton": [*columns["skeleton"][:1], *[None] * 7]
    }
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    alone = tiny_trainer(tmp_path, columns, method="student", **settings)
    without = tiny_trainer(tmp_path, nothing, term_weights={"student_task": 1.0}, **settings)
    # Row 0 is complete only so that the shape is known; with no weight on the other terms nothing else may move.
    before = weights_of(without)[: sum(p.numel() for p in without.student.parameters())]
    alone.train(), without.train()
    assert not torch.equal(before, weights_of(without)[: len(before)])
    complete = without.rows.summary()
    assert complete["student_only"] == 7 and complete["complete"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda columns: columns.pop("inertial"), "no column 'inertial'; there are 'depth', 'skeleton', 'action'"),
        (lambda columns: columns.update(depth=columns["depth"][:5]), "differ in length .*depth 5, skeleton 32"),
        (lambda columns: columns.update(action=np.zeros(32, int)), "There are 1 classes"),
        (lambda columns: columns.update(skeleton=["left"] * 32), "skeleton: no row holds an array of numbers"),
        (lambda columns: columns.update({name: values[:0] for name, values in columns.items()}), "There are no rows"),
    ],
)
def test_data_that_cannot_train_are_refused_before_work_starts(change, message, tmp_path):
    columns = tiny_columns()
    change(columns)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, columns)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "amd"}, "method='amd' is not allowed; .*did you mean 'amid'"),
        ({"term_weights": {"information": 1}}, "term_weights='information' is not allowed"),
        ({"term_weights": {"hinton": -1}}, "term_weights.hinton=-1 is not allowed; allowed: at least 0"),
        ({"temperature": 0}, "temperature=0 is not allowed; allowed: more than 0"),
        ({"memory_bank": -1}, "memory_bank=-1"),
        ({"classification_weight": 0.0}, "leaves no task"),
        ({"student_column": "colour"}, "no column 'colour'"),
    ],
)
def test_impossible_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **settings)


def test_gradient_checkpointing_that_no_encoder_knows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_checkpointing: no encoder can do it"):
        tiny_trainer(tmp_path, gradient_checkpointing=True).train()


def test_unknown_labels_processors_and_missing_auxiliaries_are_refused(tmp_path):
    evaluation = tiny_columns(8)
    evaluation["action"] = evaluation["action"] + 1
    with pytest.raises(ValueError, match=f"eval_dataset: action: {CLASSES} is not a class"):
        tiny_trainer(tmp_path, evaluation=evaluation)
    arguments = tiny_trainer(tmp_path).args
    with pytest.raises(ValueError, match="processors: sound is not a modality"):
        DistillationTrainer(tiny_student(), arguments, tiny_auxiliaries(), tiny_columns(), processors={"sound": None})
    with pytest.raises(ValueError, match="auxiliaries is empty"):
        DistillationTrainer(tiny_student(), arguments, {}, tiny_columns())


def test_evaluation_needs_the_students_modality_only(tmp_path):
    trainer = tiny_trainer(tmp_path)
    columns = {name: values for name, values in tiny_columns(8).items() if name in ("depth", "action")}
    metrics = trainer.evaluate(columns)
    assert "eval_student_accuracy" in metrics and "eval_teacher_accuracy" not in metrics
    embeds, labels = trainer.embed(columns)
    assert embeds.shape == (8, 8) and labels.tolist() == [0, 1, 2, 3] * 2
    assert torch.allclose(embeds.norm(dim=-1), torch.ones(8))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with torch.no_grad():
        trainer.student.heads.classifier.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="the loss is not finite"):
        trainer.train()


def test_the_watch_warns_once_of_a_weak_teacher_and_a_saturated_discriminator(caplog):
    watch = Watch(teacher_drop=0.05, discriminator_ceiling=0.98)
    for accuracy in (0.5, 0.8, 0.76):
        watch.check({"teacher_accuracy": accuracy, "discriminator_accuracy": 0.99})
    assert watch.warned == ["discriminator"]
    watch.check({"teacher_accuracy": 0.74, "eval_teacher_accuracy": 0.1})
    watch.check({"teacher_accuracy": 0.1, "eval_teacher_accuracy": 0.9})
    assert watch.warned == ["discriminator", "teacher"]
    assert [record.message[:11] for record in caplog.records] == ["The discrim", "The teacher"]
    resumed = Watch(0.05, 0.98)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed.state_dict() == watch.state_dict()
