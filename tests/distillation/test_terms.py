"""Each term of the objective against its formula, written out."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_dissect.distillation.evaluation import compute_prediction_metrics, recall_at_1
from hf_dissect.distillation.losses.conditional_entropy import (
    Adversary,
    Discriminator,
    anchor_loss,
    discriminator_loss,
    generator_loss,
)
from hf_dissect.distillation.losses.mean_over_rows import mean_over_rows
from hf_dissect.distillation.losses.mutual_information import MemoryBank, information_loss
from hf_dissect.distillation.losses.task import classification_loss, hinton_loss, retrieval_loss
from hf_dissect.distillation.terms import METHODS, TermWeights

COUNTED = torch.tensor([True, True, False, True, True])


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_mean_over_rows_leaves_out_what_does_not_count():
    values = torch.tensor([1.0, 2.0, torch.nan, 4.0, 5.0], requires_grad=True)
    mean = mean_over_rows(values, COUNTED)
    mean.backward()
    assert mean == 3 and values.grad.tolist() == [0.25, 0.25, 0, 0.25, 0.25]
    assert mean_over_rows(values, torch.zeros(5, dtype=torch.bool)) == 0


def test_information_is_log_n_minus_the_contrastive_loss_of_both_directions():
    x, y = unit(5, 3), unit(5, 3, seed=1)
    estimate = information_loss(torch.stack([x, y]), COUNTED, temperature=0.2)
    rows = [0, 1, 3, 4]
    scores = np.exp((x[rows] @ y[rows].T).numpy() / 0.2)
    forward = -np.log(np.diag(scores) / scores.sum(1)).mean()
    backward = -np.log(np.diag(scores) / scores.sum(0)).mean()
    assert estimate.loss.item() == pytest.approx((forward + backward) / 2, rel=1e-5)
    assert estimate.bound.item() == pytest.approx(math.log(4) - (forward + backward) / 2, rel=1e-5)


def test_equal_vectors_reach_the_bound_and_unrelated_ones_know_nothing():
    everything = torch.ones(64, dtype=torch.bool)
    same = torch.eye(64).expand(2, 64, 64)
    assert information_loss(same, everything, 0.01).bound.item() == pytest.approx(math.log(64), abs=1e-4)
    constant = torch.ones(2, 64, 1)
    assert information_loss(constant, everything, 0.1).bound.item() == pytest.approx(0, abs=1e-5)
    nobody = information_loss(same, ~everything, 0.1)
    assert nobody.loss == 0 and nobody.bound.isnan()


def test_the_memory_bank_adds_candidates_first_in_first_out():
    bank, everything = MemoryBank(capacity=6), torch.ones(4, dtype=torch.bool)
    for seed in (2, 3):
        bank.add(torch.stack([unit(4, 3, seed=seed), unit(4, 3, seed=seed + 10)]))
    held_x = torch.cat([unit(4, 3, seed=2), unit(4, 3, seed=3)])[-6:]
    held_y = torch.cat([unit(4, 3, seed=12), unit(4, 3, seed=13)])[-6:]
    assert torch.equal(bank.vectors, torch.stack([held_x, held_y]))
    x, y = unit(4, 3), unit(4, 3, seed=1)
    estimate = information_loss(torch.stack([x, y]), everything, 0.5, bank)
    losses = []
    for own, other, held in ((x, y, held_y), (y, x, held_x)):
        scores = np.exp((own @ torch.cat([other, held]).T).numpy() / 0.5)
        losses.append(-np.log(np.diag(scores) / scores.sum(1)).mean())
    assert estimate.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert estimate.bound.item() == pytest.approx(math.log(10) - np.mean(losses), rel=1e-5)
    bank.add(information_loss(torch.stack([x, y]), torch.tensor([True, False, False, False]), 0.5).pairs)
    assert torch.equal(bank.vectors[0, -1], x[0]) and bank.vectors.shape[1] == 6


class _Sum(nn.Module):
    """A discriminator whose logit is known by hand."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return self.scale * (teacher.sum(-1) + 2 * student.sum(-1))


def test_generator_and_discriminator_are_trained_against_each_other():
    real, generated, student = (torch.randn(5, 2, requires_grad=True) for _ in range(3))
    logits = (generated.sum(1) + 2 * student.sum(1))[COUNTED].detach().numpy()
    loss = generator_loss(_Sum().requires_grad_(False), generated, student, COUNTED)
    assert loss.item() == pytest.approx(-np.log1p(np.exp(logits)).mean(), rel=1e-5)
    loss.backward()
    assert generated.grad[COUNTED].ne(0).all() and student.grad is None  # s as a condition gets no gradient
    generated.grad = None
    discriminator = _Sum()
    loss, accuracy = discriminator_loss(discriminator, real, generated, student, COUNTED)
    true = (real.sum(1) + 2 * student.sum(1))[COUNTED].detach().numpy()
    expected = (np.log1p(np.exp(-true)).mean() + np.log1p(np.exp(logits)).mean()) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert accuracy.item() == pytest.approx(((true > 0).mean() + (logits < 0).mean()) / 2)
    loss.backward()
    assert discriminator.scale.grad != 0 and real.grad is None and generated.grad is None


def test_the_anchor_is_the_squared_error_of_the_generator_alone():
    generated, real = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    loss = anchor_loss(generated, real, COUNTED)
    assert loss.item() == pytest.approx((generated - real)[COUNTED].square().mean().item(), rel=1e-5)
    loss.backward()
    assert real.grad is None and generated.grad[COUNTED].ne(0).all()


def test_the_adversary_learns_to_separate_and_resumes_from_its_state():
    def train(adversary: Adversary, steps: range) -> torch.Tensor:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            real, generated, student = torch.randn(3, 16, 4, generator=generator)
            accuracy = adversary.accumulate(
                lambda network, parts=(real + 1, generated - 1, student): discriminator_loss(
                    network, *parts, torch.ones(16, dtype=torch.bool)
                ),
                share=1.0,
            )
            adversary.step()
        return accuracy

    torch.manual_seed(0)
    whole = Adversary(Discriminator(4, 4, 8), learning_rate=1e-2)
    torch.manual_seed(0)
    first = Adversary(Discriminator(4, 4, 8), learning_rate=1e-2)
    assert train(whole, range(60)) > 0.9
    train(first, range(30))
    resumed = Adversary(Discriminator(4, 4, 8), learning_rate=1e-2)
    resumed.load_state_dict(first.state_dict())
    train(resumed, range(30, 60))
    for name, weight in whole.discriminator.state_dict().items():
        assert torch.equal(weight, resumed.discriminator.state_dict()[name])
    with whole.frozen() as frozen:
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in whole.discriminator.parameters())


def test_task_losses():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    shares = logits.softmax(-1)[COUNTED, labels[COUNTED]]
    assert classification_loss(logits, labels, COUNTED).item() == pytest.approx(-shares.log().mean().item(), rel=1e-5)
    embeds = unit(5, 3)
    scores = np.exp((embeds @ embeds.T).numpy() / 0.3)
    pairs = {0: 3, 3: 0, 1: 4, 4: 1}  # row 2 does not count
    losses = [-np.log(scores[i, j] / sum(scores[i, k] for k in pairs if k != i)) for i, j in pairs.items()]
    assert retrieval_loss(embeds, labels, COUNTED, 0.3).item() == pytest.approx(np.mean(losses), rel=1e-4)
    alone = torch.tensor([0, 1, 2, 3, 4])
    assert retrieval_loss(embeds, alone, COUNTED, 0.3) == 0


def test_hinton_is_the_scaled_divergence_and_spares_the_teacher():
    student, teacher = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    loss = hinton_loss(student, teacher, COUNTED, temperature=2.0)
    p, q = (torch.softmax(part.detach() / 2, -1)[COUNTED].numpy() for part in (teacher, student))
    assert loss.item() == pytest.approx(4 * (p * np.log(p / q)).sum(1).mean(), rel=1e-4)
    loss.backward()
    assert teacher.grad is None and student.grad[COUNTED].ne(0).all()


def test_methods_are_sets_of_terms():
    assert list(METHODS) == ["student", "hinton", "crd", "mi_student_only", "amid"]
    assert not METHODS["student"].needs_teacher and METHODS["hinton"].needs_teacher
    assert [name for name, weights in METHODS.items() if weights.needs_generator] == ["amid"]
    assert TermWeights(information_auxiliary=0.5).needs_teacher


def test_metrics_judge_each_network_on_what_it_could_read():
    logits = np.eye(3)[[0, 1, 2, 0]]
    embeds = unit(4, 8).numpy()
    metrics = compute_prediction_metrics(
        {
            "student_logits": logits,
            "teacher_logits": logits,
            "auxiliary.skeleton_logits": logits,
            "student_embeds": embeds,
        },
        label=np.array([0, 1, 0, 0]),
        row_state=np.array([0, 0, 2, 6], dtype=np.int8),  # complete, complete, student only, unusable
    )
    assert metrics["student_accuracy"] == pytest.approx(2 / 3)
    assert metrics["teacher_accuracy"] == metrics["auxiliary_skeleton_accuracy"] == 1
    queries = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    assert recall_at_1(queries, torch.tensor([0, 0, 1])) == pytest.approx(2 / 3)
    assert recall_at_1(queries, torch.tensor([0, 0, 1]), queries[:1], torch.tensor([1])) == pytest.approx(1 / 3)
