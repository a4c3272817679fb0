"""Temperature of the evidence, against its formulas, and where it must stay 1."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from hf_dissect.losses import ContrastiveLoss
from hf_dissect.losses.evidence_temperature import (
    COLUMNS,
    GRID,
    EvidenceTemperature,
    TemperedLosses,
    make_columns,
    measure_pairs,
    measure_rows,
)
from hf_dissect.losses.logit_rows import smoothed_softmax_losses
from hf_dissect.losses.noisy_channel import NoisyChannel


def make_embeds(number: int, seed: int, known: float = 0.0, mismatched: float = 0.0, dim: int = 64):
    """Embeddings of images and captions: cosines of pairs are about `known`, of the others around 0."""
    generator = torch.Generator().manual_seed(seed)
    images, noise = F.normalize(torch.randn(2, number, dim, generator=generator), dim=-1)
    shown = torch.cat([images[: round(mismatched * number)].roll(1, 0), images[round(mismatched * number) :]])
    return images, F.normalize(known * shown + math.sqrt(1 - known**2) * noise, dim=-1)


def make_mask(number: int) -> torch.Tensor:
    """Every fifth pair shares its image with the next; true pairs are included."""
    key = torch.arange(number) - (torch.arange(number) % 5 == 1).long()
    return key[:, None] == key


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("number", [2, 40, 64, 65, 130, 200])
def test_a_sample_is_measured_at_every_temperature(number, masked):
    images, texts = (embeds.double() for embeds in make_embeds(number, 0, known=0.4))
    logits, mask = texts @ images.T * 30 - 4, make_mask(number) if masked else None
    measured = (measure_rows(logits, 0, mask) + measure_rows(logits.T, 0, mask)) / 2
    counts = torch.full((number,), number) if mask is None else number + 1 - mask.sum(1)
    columns = make_columns(measured, counts)
    spacing = math.ceil(number / 64)
    sampled = torch.arange(0, number, spacing)
    assert 32 <= len(sampled) <= 64 or number < 32
    kept = logits if mask is None else logits.masked_fill(mask & ~torch.eye(number, dtype=torch.bool), -math.inf)
    for name, factor in zip(COLUMNS, GRID, strict=False):
        own = ((factor * kept).log_softmax(1).diagonal() + (factor * kept).log_softmax(0).diagonal()) / 2
        expected = torch.full((number,), math.nan)
        expected[sampled] = (counts.log() + own).float()[sampled]
        torch.testing.assert_close(columns[name], expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    for i in sampled.tolist():
        row, column = kept[i][kept[i].isfinite()], kept[:, i][kept[:, i].isfinite()]
        variance = (row.var(correction=0) + column.var(correction=0)) / 2
        assert columns["variance"][i].item() == pytest.approx(variance.item(), rel=1e-4)
    if not masked:
        for name, values in measure_pairs(images, texts, torch.tensor(30.0)).items():
            torch.testing.assert_close(values, columns[name], equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_sample_is_the_same_for_any_number_of_ranks(parts):
    logits = torch.randn(210, 210, generator=torch.Generator().manual_seed(1))
    size = 210 // parts
    pieces = [measure_rows(logits[start : start + size], start, None) for start in range(0, 210, size)]
    torch.testing.assert_close(torch.cat(pieces), measure_rows(logits, 0, None), equal_nan=True)
    assert measure_rows(logits[1:2], 1, None).isnan().all()  # a rank without a row of the sample


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_single(dtype):
    logits = (torch.randn(9, 9, generator=torch.Generator().manual_seed(1)) * 30).to(dtype)
    torch.testing.assert_close(measure_rows(logits, 0, None), measure_rows(logits.float(), 0, None))
    losses = TemperedLosses(0.3)(logits, 0, None)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, TemperedLosses(0.3)(logits.float(), 0, None))


def observed(number: int, seed: int) -> dict[str, torch.Tensor]:
    return measure_pairs(*make_embeds(number, seed, known=0.1), 100.0)


def test_averages_and_temperature_follow_from_all_that_a_step_observed():
    temperature = EvidenceTemperature()
    shares, likelihoods, expected = [0.5] * len(GRID), [0.0] * len(GRID), []
    for step in range(4):
        temperature.begin_step()
        assert temperature.value == (expected[-1] if expected else 1.0)
        batches = [observed(40, 2 * step), observed(30, 2 * step + 1)]
        for columns in batches:
            temperature.observe(columns)
            assert temperature.value == (expected[-1] if expected else 1.0)  # one for all micro-batches
        rows = {name: torch.cat([columns[name] for columns in batches]).double() for name in COLUMNS}
        for i in range(len(GRID)):
            ratio, share = rows[COLUMNS[i]].exp(), shares[i]
            likelihood = (share * ratio + 1 - share).log().mean().item()
            likelihoods[i] = 0.95 * likelihoods[i] + 0.05 * likelihood
            posterior = (share * ratio / (share * ratio + 1 - share)).mean().item()
            shares[i] = min(max(0.95 * share + 0.05 * posterior, 0.05), 0.999)
        likely = [own > max(likelihoods) - 0.002 for own in likelihoods]
        likeliest = GRID[likely.index(True)]
        sigma = math.sqrt(rows["variance"].mean().item())
        expected.append(pytest.approx(min(1.0, max(2 * likeliest, 2.5 / sigma)), rel=1e-6))
    temperature.begin_step()
    assert temperature.value == expected[-1] and temperature.value < 1
    lowest = temperature.pop_lowest()
    assert lowest == min(lowest, temperature.value) and temperature.pop_lowest() == temperature.value
    value = temperature.value
    temperature.begin_step()  # nothing was observed
    temperature.observe({"posterior": torch.ones(3)})
    temperature.begin_step()
    assert temperature.value == value


def run(steps: int, scale: float, **embeds) -> list[float]:
    temperature, values = EvidenceTemperature(), []
    for step in range(steps):
        temperature.begin_step()
        values.append(temperature.value)
        temperature.observe(measure_pairs(*make_embeds(256, step, **embeds), scale))
    return values


def test_only_an_over_confident_model_is_tempered():
    confident = run(30, 100.0)
    assert confident[0] == 1 and max(confident[1:]) < 0.25
    assert confident[-1] == pytest.approx(2.5 / (100 / 8), rel=0.05)  # cosines of 64 dimensions deviate by 1/8
    assert set(run(30, 1 / 0.07)) == {1.0}  # the usual scale
    for mismatched in (0.0, 0.4):  # a model that knows its pairs may be as sure of them
        assert set(run(30, 100.0, known=0.7, mismatched=mismatched)) == {1.0}


def test_a_saved_temperature_continues_bit_for_bit():
    whole, resumed = EvidenceTemperature(), EvidenceTemperature()
    for step in range(3):
        whole.begin_step()
        whole.observe(observed(20, step))
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for temperature in (whole, resumed):
        temperature.observe(observed(20, 9))
        temperature.begin_step()
    assert resumed.state_dict() == whole.state_dict() and whole.value < 1
    earlier = NoisyChannel()
    earlier.load_state_dict({"pi": 0.3, "sum": 1.0, "count": 2})  # of a version without a temperature
    assert earlier.pi == 0.3 and earlier.temperature.value == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_keep_their_gradient_and_evidence_is_tempered(masked, smoothing):
    logits = (torch.randn(12, 12, generator=torch.Generator().manual_seed(1)) * 20).requires_grad_()
    mask = make_mask(12) if masked else None
    plain = smoothed_softmax_losses(logits, 0, mask, smoothing)
    assert TemperedLosses(1.0, smoothing)(logits, 0, mask).equal(plain)
    losses = TemperedLosses(0.25, smoothing)(logits, 0, mask)
    assert losses[:, 0].equal(plain[:, 0])
    torch.testing.assert_close(losses[:, 1], smoothed_softmax_losses(logits / 4, 0, mask, 0.0)[:, 1])
    sums = losses[:, 0].sum(), plain[:, 0].sum(), losses.sum()
    gradients = [torch.autograd.grad(own, logits, retain_graph=True)[0] for own in sums]
    assert gradients[0].equal(gradients[1]) and gradients[2].equal(gradients[1])  # none through the evidence


def test_blocks_of_rows_are_measured_once():
    images, texts = (embeds.requires_grad_() for embeds in make_embeds(20, 0))
    found = []
    for max_logits in (2**20, 40):
        rows = TemperedLosses(0.5)

        def weigh(losses, counts, rows=rows):
            found.append(rows.pop_columns(counts))
            return torch.exp(-losses)

        outputs = {"image_embeds": images, "text_embeds": texts}
        loss = ContrastiveLoss("softmax", max_logits=max_logits, row_losses=rows)
        loss = loss(outputs, scale=torch.tensor(50.0), weights=weigh)
        found[-1]["gradient"] = torch.autograd.grad(loss, images)[0]
    torch.testing.assert_close(found[0], found[1])
    assert found[0]["variance"].isfinite().all()
