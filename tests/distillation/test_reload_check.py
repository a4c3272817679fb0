"""Before a distillation, a warning says if the saved student would give other predictions than the trained one."""

import logging

import pytest
import torch
from testing.tiny_modalities import (
    tiny_arguments,
    tiny_auxiliaries,
    tiny_columns,
    tiny_student,
    tiny_trainer,
    weights_of,
)

from hf_dissect.distillation import DistillationTrainer, FrameSequenceEncoder
from hf_dissect.report.live import LIVE_FILES


def list_warnings(caplog) -> list[str]:
    records = [record for record in caplog.records if record.name.endswith("reload_check")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("settings", [{}, {"method": "student"}, {"bf16": True}, {"embedding_size": 5}])
def test_a_sound_student_comes_back(settings, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_dissect.training.reload_check"):
        tiny_trainer(tmp_path / "run", max_steps=1, **settings).train()
    assert "Saving and loading the model was checked" in caplog.text and list_warnings(caplog) == []
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*LIVE_FILES}


class Doubled(FrameSequenceEncoder):
    """Encoder that is saved as its parent."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.pooler_output = output.pooler_output.flip(-1)
        return output


def make_changed(change: str, folder, **settings) -> DistillationTrainer:
    student = tiny_student()
    if change == "subclass":
        other = Doubled(student.config)
        other.load_state_dict(student.state_dict())
        student = other
    trainer = DistillationTrainer(
        student, tiny_arguments(folder, max_steps=1, **settings), tiny_auxiliaries(), tiny_columns()
    )
    if change == "logits":  # which the embeddings do not show
        heads, forward = trainer.student.heads, trainer.student.heads.forward
        heads.forward = lambda features: tuple(
            -part if place == 0 else part for place, part in enumerate(forward(features))
        )
    if change == "weight":
        trainer.student.gate = torch.nn.Parameter(torch.zeros(()))
    return trainer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("subclass", "encoder is a Doubled and is loaded as FrameSequenceEncoder"),
        ("logits", "its logits differ by"),
        ("weight", "these weights train and are not saved, or not loaded: gate"),
    ],
)
def test_whatever_is_lost_is_reported(change, message, tmp_path, caplog):
    make_changed(change, tmp_path).train()
    (warning,) = list_warnings(caplog)
    assert message in warning and "distillation.check_reload in a recipe" in warning
    caplog.clear()
    make_changed(change, tmp_path, check_reload=False).train()
    assert list_warnings(caplog) == []


def test_the_check_leaves_no_trace_in_the_run(tmp_path):
    trained = []
    for checks in (True, False):
        trainer = tiny_trainer(tmp_path, check_reload=checks, max_steps=3, encoder={"dropout": 0.2, "noise": 0.1})
        trainer.train()
        trained.append(torch.cat([weights_of(trainer), torch.rand(3)]))
    assert torch.equal(*trained)


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
BEST |= {"save_steps": 2, "max_steps": 4}


@pytest.mark.parametrize("metric", ["student_accuracy", "eval_retrieval_R@1", "loss", "teacher_accuracy"])
def test_the_best_checkpoint_is_chosen_by_a_figure_that_exists(metric, tmp_path):
    trainer = tiny_trainer(tmp_path, evaluation=tiny_columns(8, seed=1), metric_for_best_model=metric, **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    evaluated = {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}
    assert metric.removeprefix("eval_") in evaluated


@pytest.mark.parametrize(
    ("metric", "missing", "settings", "allowed"),
    [
        ("accuracy", (), {}, "loss, student_accuracy, retrieval_R@1, teacher_accuracy, auxiliary_skeleton_accuracy"),
        ("eval_student_acuracy", (), {}, "student_accuracy"),
        ("teacher_accuracy", ("inertial",), {}, "loss, student_accuracy, retrieval_R@1."),
        ("teacher_accuracy", (), {"method": "student"}, "loss, student_accuracy, retrieval_R@1."),
        ("auxiliary_skeleton_accuracy", (), {"term_weights": {"auxiliary_task": 0}}, "teacher_accuracy."),
    ],
)
def test_a_figure_that_no_evaluation_gives_is_refused_before_training(metric, missing, settings, allowed, tmp_path):
    evaluation = {name: values for name, values in tiny_columns(8, seed=1).items() if name not in missing}
    with pytest.raises(ValueError, match=f"metric_for_best_model='{metric}' is not a figure.*allowed: .*{allowed}"):
        tiny_trainer(tmp_path, evaluation=evaluation, metric_for_best_model=metric, **BEST, **settings)
