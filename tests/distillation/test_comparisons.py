"""Networks that compare features: rows are standardised, and the student's own modality is no short cut."""

import pytest
import torch

from hf_dissect.distillation.comparisons import Comparison, RowStandardisation
from tests.testing.tiny_modalities import tiny_trainer

COUNTED = torch.tensor([True, True, False, True, True])


def make_rows() -> torch.Tensor:
    """Features that are nearly the same for all rows; one row, which does not count, is far off."""
    rows = 3 + 0.1 * torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    rows[2] = 100
    return rows


def test_counted_rows_get_zero_mean_and_unit_deviation():
    layer, rows = RowStandardisation(2), make_rows()
    counted = rows[COUNTED]
    expected = (rows - counted.mean(0)) / (counted.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(layer(rows, COUNTED), expected)
    assert layer(rows, COUNTED)[COUNTED].mean(0).abs().max() < 1e-4
    torch.testing.assert_close(layer(counted), expected[COUNTED])  # all rows count where no mask says otherwise


def test_evaluation_uses_the_statistics_of_training():
    layer, rows = RowStandardisation(2, momentum=0.25), make_rows()
    torch.testing.assert_close(layer.eval()(rows), rows)  # nothing is known yet
    layer.train()
    layer(rows, COUNTED)
    layer(2 * rows, COUNTED)
    mean = 0.75 * rows[COUNTED].mean(0) + 0.25 * 2 * rows[COUNTED].mean(0)
    layer.eval()
    torch.testing.assert_close(layer.mean, mean)
    assert (layer(rows)[0] - (rows[0] - layer.mean) / layer.deviation).abs().max() < 1e-5
    assert layer(rows[:1]).isfinite().all()


@pytest.mark.parametrize("counted", [torch.zeros(5, dtype=torch.bool), torch.arange(5) == 1])
def test_fewer_than_two_rows_have_no_statistics_of_their_own(counted):
    layer, rows = RowStandardisation(2), make_rows()
    torch.testing.assert_close(layer(rows, counted), rows)
    assert layer.num_batches == 0
    layer(rows, COUNTED)
    torch.testing.assert_close(layer(rows, counted), (rows - layer.mean) / layer.deviation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearly_equal_features_are_told_apart_at_the_start(dtype):
    torch.manual_seed(0)
    comparison = Comparison(8, 8, 4).to(dtype)
    features = (1 + 0.02 * torch.randn(64, 8)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        x, y = comparison(features, features)
    assert x.dtype == y.dtype == torch.float32
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(64), atol=1e-2, rtol=0)
    assert (x @ x.T).fill_diagonal_(0).mean() < 0.5  # near 1 without standardisation


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({"method": "amid"}, False),
        ({"method": "amid", "compared_teacher": "all"}, True),
        ({"method": "mi_student_only"}, True),
        ({"method": "mi_student_only", "compared_teacher": "auxiliaries"}, False),
    ],
)
def test_the_teachers_view_of_the_students_modality_learns_from_the_comparison_only_if_asked(
    settings, learns, tmp_path
):
    terms = {"student_task": 0, "teacher_task": 0, "auxiliary_task": 0, "information_student": 1}
    terms |= {"information_auxiliary": 0, "conditional_entropy": 0}
    trainer = tiny_trainer(tmp_path, term_weights=terms, **settings)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = [parameter.grad for parameter in trainer.model.teacher.encoder.parameters()]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients) == learns
    fused = trainer.model.teacher.fusion[1].weight.grad
    assert fused is not None and fused.abs().max() > 0  # the auxiliaries teach either way
