"""The criterion predicts by a rule that can be written down, from networks that it leaves as they are."""

import json

import numpy as np
import pytest
import torch
from testing.tiny_modalities import tiny_columns, tiny_trainer, weights_of

from hf_dissect.distillation import criterion as module
from hf_dissect.distillation.criterion import Criterion, RowPart, hold_out, measure_criterion

COUNTS = {"held_out": "rows", "rows": 60, "held_out_rows": 30, "labelled_rows": 30, "labelled_held_out_rows": 15}


def given(share=0.5, student=2.0, teacher=1.0, auxiliaries=1.5, entropy=3.0, bound=1.5, uncapped=2.0) -> Criterion:
    entropies = {"cross_entropy_student": student, "cross_entropy_teacher": teacher}
    entropies |= {"cross_entropy_auxiliaries": auxiliaries, "label_entropy": entropy}
    return Criterion(
        **COUNTS, unlabelled_share=share, information_bound=bound, information_uncapped=uncapped, **entropies
    )


@pytest.mark.parametrize(
    "changed, gain, method",
    [
        ({}, 0.5 * (2.0 - 1.0), "amid"),  # I(T;S) = 2 > I(S;Y) = 1
        ({"uncapped": 0.5}, 0.5, "amid"),  # the bound alone says 1.5
        ({"uncapped": 0.5, "bound": 0.9}, 0.5, "hinton"),
        ({"uncapped": None, "bound": None}, 0.5, "hinton"),
        ({"teacher": 1.8}, 0.5 * (2.0 - 1.5), "amid"),  # S and A know more than T
        ({"teacher": None}, 0.25, "amid"),
        ({"share": 0.04}, 0.04, "student"),
        ({"share": 0.0}, 0.0, "student"),
        ({"share": 0.0, "student": None}, 0.0, "student"),
        ({"teacher": 2.5, "auxiliaries": 2.5}, 0.0, "student"),  # a teacher that knows less
        ({"student": None}, None, "student"),
        ({"teacher": None, "auxiliaries": None}, None, "student"),
        ({"entropy": None}, 0.5, "hinton"),
    ],
)
def test_the_rule(changed, gain, method):
    found = given(**changed)
    assert found.gain == (None if gain is None else pytest.approx(gain)) and found.method == method
    assert ("not known" in found.sentence) == (gain is None)
    assert ("can gain" in found.sentence) == (method != "student") or gain is None
    assert Criterion.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_sentences():
    assert given().sentence == (
        "the teacher knows 0.5 nats that the labels do not tell the student: distillation can gain (amid)"
    )
    assert given(share=0.02).sentence == (
        "the teacher knows 0.02 nats that the labels do not tell the student: nothing to gain here: train the student "
        "alone"
    )
    assert "30 labelled rows and 15 held out; at least 10" in given(student=None).sentence


def test_estimates_may_be_negative():
    found = given(student=3.5, auxiliaries=4.0)
    assert (found.student_label, found.teacher_label, found.auxiliaries_label) == (-0.5, 2.0, -0.5)


@pytest.mark.parametrize(
    "groups, held_out",
    [
        (None, 20),
        (["a"] * 50 + ["b"] * 50, 50),
        ([place % 10 for place in range(100)], 20),
        (["a"] * 99 + [None], None),
        (["only"] * 100, 20),
        (np.arange(100), 20),
    ],
)
def test_rows_are_held_out_by_group(groups, held_out):
    own, other = hold_out([0] * 100, groups)
    assert sorted(own + other) == list(range(100)) and own and other and own == sorted(own)
    assert held_out is None or len(other) == held_out
    if groups is not None and len(set(groups)) > 1:
        assert not {groups[place] for place in own} & {groups[place] for place in other}
    assert hold_out([0] * 100, groups) == (own, other)


@pytest.mark.parametrize("every, held_out", [(1, 20), (5, 50), (8, 50), (1000, 50)])
def test_more_rows_are_held_out_where_few_have_labels(every, held_out):
    numbers = [0 if place % every == 0 else -1 for place in range(100)]
    parts = [hold_out(numbers, groups) for groups in (None, [place % 10 for place in range(100)])]
    for _, other in parts:
        labels = sum(numbers[place] == 0 for place in other)
        assert 20 <= len(other) <= held_out and (labels >= 10 or len(other) == 50)


def measure(trainer, own, held_out) -> Criterion:
    rows = trainer.train_dataset
    parts = RowPart(rows, own), RowPart(rows, held_out)
    return measure_criterion(trainer.model, trainer.data_collator, *parts, described="some", batch_size=7)


def test_rows_that_lack_something_are_counted_and_left_out(tmp_path):
    columns = tiny_columns(120)
    columns["action"] = np.where(np.arange(120) % 3 == 0, columns["action"].astype(object), None)
    columns["skeleton"][:10], columns["inertial"][10, 0, 0] = np.nan, np.inf
    trainer = tiny_trainer(tmp_path, columns, method="hinton", term_weights={"hinton": 0})
    found = measure(trainer, range(80), range(80, 120))
    assert (found.rows, found.held_out_rows, found.labelled_rows, found.labelled_held_out_rows) == (69, 40, 23, 13)
    # 80 rows lack a label; 7 of those among the first eleven have no skeleton or no sound inertial signal
    assert found.unlabelled_share == pytest.approx((80 / 120) * (46 / 53))
    assert found.cross_entropy_student is not None and found.information_cap == pytest.approx(np.log(40))


def test_few_labels_are_not_known_and_not_zero(tmp_path):
    columns = tiny_columns(60)
    columns["action"] = np.where(np.arange(60) < 8, columns["action"].astype(object), None)
    trainer = tiny_trainer(tmp_path, columns, method="hinton")
    found = measure(trainer, range(40), range(40, 60))
    assert found.gain is None and found.method == "student" and "8 labelled rows and 0 held out" in found.sentence
    assert found.information_bound is not None and found.student_label is None


def test_classes_without_a_labelled_training_row_are_left_out(tmp_path):
    columns = tiny_columns(80)
    columns["action"] = np.repeat([0, 1, 2, 3], 20)
    found = measure(tiny_trainer(tmp_path, columns), range(60), range(40, 80))
    assert (found.labelled_rows, found.labelled_held_out_rows) == (60, 20)


def test_the_number_of_rows_is_capped_and_labels_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 40)
    monkeypatch.setattr(module, "MOST_HELD_OUT_ROWS", 30)
    columns = tiny_columns(200)
    columns["action"] = np.where(np.arange(200) % 8 == 0, columns["action"].astype(object), None)
    columns["action"][:5] = [0, 1, 2, 3, 0]
    trainer = tiny_trainer(tmp_path, columns)
    found = measure(trainer, range(100), range(100, 200))
    assert (found.rows, found.labelled_rows, found.held_out_rows) == (40, 17, 30)
    labelled = sum(number >= 0 for number in trainer.train_dataset.label_numbers)
    assert found.unlabelled_share == pytest.approx(1 - labelled / 200)


def test_networks_and_random_states_stay(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_columns(60), encoder={"dropout": 0.5, "noise": 0.1})
    trainer.model.train()
    trainer.model.student.encoder.eval()
    modes = [part.training for part in trainer.model.modules()]
    weights, states = weights_of(trainer), (torch.random.get_rng_state(), np.random.get_state()[1].copy())
    first, second = measure(trainer, range(40), range(40, 60)), measure(trainer, range(40), range(40, 60))
    assert [part.training for part in trainer.model.modules()] == modes
    assert torch.equal(weights_of(trainer), weights) and torch.equal(torch.random.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert first.to_dict() | {"seconds": 0} == second.to_dict() | {"seconds": 0}


def test_networks_without_a_teacher_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no teacher"):
        measure(tiny_trainer(tmp_path, method="student"), range(20), range(20, 32))


def test_a_network_that_diverged_is_warned_of(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, tiny_columns(60))
    next(trainer.model.teacher.parameters()).data.fill_(np.nan)
    found = measure(trainer, range(40), range(40, 60))
    assert "Features of 40 rows are not finite" in caplog.text and found.rows == 0 and found.gain == 0.0
    assert found.information_bound is None and found.label_entropy is None
