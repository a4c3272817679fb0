"""A run measures what its teacher knows before and after training, and trains as it would without."""

import json

import numpy as np
import pytest
import torch
from testing.tiny_modalities import tiny_columns, tiny_trainer, weights_of

SETTINGS = {"encoder": {"dropout": 0.2, "noise": 0.1, "shift": 1}, "max_steps": 4, "logging_steps": 2}


def columns_of(count: int = 80):
    columns = tiny_columns(count)
    columns["action"] = np.where(np.arange(count) % 2 == 0, np.arange(count) // 2 % 4, None)
    columns["skeleton"][6], columns["depth"][7] = np.nan, 0
    return columns


@pytest.mark.parametrize("more", [{}, {"bf16": True, "gradient_accumulation_steps": 2, "memory_bank": 12}])
def test_the_weights_are_those_of_a_run_that_does_not_measure(more, tmp_path):
    runs = []
    for wanted in (True, False):  # one after the other, since building a trainer seeds
        runs.append(tiny_trainer(tmp_path, columns_of(), measure_information=wanted, **SETTINGS, **more))
        runs[-1].train()
    assert torch.equal(weights_of(runs[0]), weights_of(runs[1]))
    measured, plain = ([entry for entry in trainer.state.log_history if "loss" in entry] for trainer in runs)
    assert measured == plain
    first = runs[0].state.log_history[0]
    assert first["step"] == 0 and {"criterion_information_bound", "criterion_information_cap"} <= first.keys()
    assert runs[1].measurement.measured == {} and "information" not in runs[1].run_metrics({})


def test_metrics_report_and_card_state_both(tmp_path):
    settings = SETTINGS | {"save_run_folder": True, "measure_information": True}
    tiny_trainer(tmp_path, columns_of(), **settings).train()
    information = json.loads((tmp_path / "metrics.json").read_text())["information"]
    assert list(information) == ["before", "after"]
    for part in information.values():
        assert part["rows"] + part["held_out_rows"] == 79 and part["unlabelled_share"] == pytest.approx(
            0.4875, abs=0.02
        )
        assert part["held_out"] == "24 training rows, on which the networks train as well"
        assert part["method"] in ("student", "hinton", "amid")
    report, card = ((tmp_path / name).read_text() for name in ("report.html", "README.md"))
    for when in ("before", "after"):
        assert information[when]["sentence"] in card.replace("\\", "") and information[when]["sentence"] in report
    assert f"{information['after']['information_cap']:.2f}" in report


@pytest.mark.parametrize(
    "change, held_out",
    [
        ({}, "24 validation rows"),
        ({"skeleton": None}, "24 training rows"),
        ({"skeleton": np.full((24, 6, 2, 3), np.nan, np.float32)}, "24 training rows"),
        ({"action": [None] * 24}, "24 training rows"),
    ],
)
def test_validation_rows_are_held_out_if_they_can_be(change, held_out, tmp_path):
    evaluation = {name: values for name, values in (tiny_columns(24, seed=1) | change).items() if values is not None}
    trainer = tiny_trainer(tmp_path, columns_of(), evaluation, measure_information=True)
    trainer.measurement.measure("before")
    assert trainer.measurement.measured["before"].held_out.startswith(held_out)


def test_a_resumed_run_keeps_what_was_measured_before(tmp_path):
    settings = {"measure_information": True, "save_strategy": "steps", "save_steps": 2}
    first = tiny_trainer(tmp_path, columns_of(), max_steps=2, **settings)
    first.train()
    resumed = tiny_trainer(tmp_path, columns_of(), max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.measurement.measured == first.measurement.measured != {}
    assert sum("criterion_information_cap" in entry for entry in resumed.state.log_history) == 1


def test_a_student_alone_is_not_measured(tmp_path):
    trainer = tiny_trainer(tmp_path, columns_of(), method="student", measure_information=True, max_steps=1)
    trainer.train()
    assert trainer.measurement.describe() == {}


def test_an_error_ends_no_run_and_is_said(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, columns_of(), measure_information=True, max_steps=1)
    trainer.model.auxiliaries["skeleton"].forward = None
    trainer.measurement.measure("before")
    assert "could not be measured before training: TypeError" in caplog.text
    assert trainer.measurement.measured == {}
