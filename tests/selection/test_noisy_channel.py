"""Drawing candidates by the weights of the noisy channel."""

import math

import pytest
import torch
import torch.nn.functional as F
from testing.faulty_run import make_trainer

from hf_dissect.selection import CandidateScores, SampleLedger, make_strategy

PAIRS = 32
CLEAN = torch.arange(PAIRS) % 4 != 0


def make_scores(scale: float = 20.0, kind: str = "softmax") -> CandidateScores:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(PAIRS, 16, generator=generator), dim=-1)
    shown = torch.where(CLEAN[:, None], image, image.roll(4, 0))
    text = F.normalize(shown + 0.1 * torch.randn(PAIRS, 16, generator=generator), dim=-1)
    bias = -3.0 if kind == "sigmoid" else 0.0
    return CandidateScores(torch.arange(100, 100 + PAIRS), image, text, scale, bias, kind)


def written_out(scores: CandidateScores, pi: float, tau: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior and evidence of the candidates."""
    logits = (scores.text_embeds @ scores.image_embeds.T).double() * tau * scores.logit_scale + scores.logit_bias
    q = ((logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2).exp()
    return pi * q / (pi * q + (1 - pi) / PAIRS), ((PAIRS - 1) * q / (1 - q)).log()


@pytest.fixture
def ledger() -> SampleLedger:
    return SampleLedger(200, columns=("correlation", "evidence"))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("pi", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("k", "tau"), [(2, 1.0), (11, 1.0), (30, 1.0), (PAIRS, 1.0), (11, 0.3)])
def test_weights_are_those_of_the_channel_over_the_inclusion(k, tau, pi, kind, ledger):
    scores, strategy = make_scores(4.0, kind), make_strategy("noisy_channel")
    strategy.channel.pi, strategy.channel.temperature.value = pi, tau
    selection = strategy.select(scores, ledger, k)
    posterior, evidence = written_out(scores, pi, tau)
    measured = strategy.measure(scores, ledger)
    torch.testing.assert_close(measured["posterior"], posterior.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measured["evidence"], evidence.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(selection.priority, posterior.float(), rtol=1e-4, atol=1e-6)
    weights = posterior.square()
    low, high = 0.0, k / weights.min().item()
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (c * weights).clamp_max(1).sum() < k else (low, c)
    expected = weights / (high * weights).clamp_max(1)
    assert len(selection.indices) == k and (selection.indices.diff() > 0).all()
    torch.testing.assert_close(selection.weights, expected[selection.indices].float(), rtol=1e-3, atol=1e-6)


def test_the_weighted_sum_over_the_drawn_is_on_average_that_over_all(ledger):
    scores, strategy = make_scores(5.0), make_strategy("noisy_channel")
    posterior, _ = written_out(scores, 0.5)
    values = torch.linspace(-1, 3, PAIRS, dtype=torch.float64)
    sums = []
    for seed in range(1500):
        strategy.generator.manual_seed(seed)
        selection = strategy.select(scores, ledger, 10)
        sums.append((selection.weights.double() * values[selection.indices]).sum())
    sums = torch.stack(sums)
    full = (posterior.square() * values).sum()
    assert abs(sums.mean() - full) < 4.5 * sums.std() / math.sqrt(len(sums))


def test_the_draw_depends_on_the_own_generator_alone(ledger):
    strategy, scores, chosen = make_strategy("noisy_channel"), make_scores(), []
    before = torch.get_rng_state()
    for seed in (1, 2, 1):
        strategy.generator.manual_seed(seed)
        chosen.append(strategy.select(scores, ledger, 10).indices.tolist())
    assert chosen[0] == chosen[2] != chosen[1] and torch.get_rng_state().equal(before)


def test_mismatched_pairs_are_hardly_drawn(ledger):
    strategy, scores = make_strategy("noisy_channel"), make_scores(30.0)
    drawn = torch.cat([strategy.select(scores, ledger, 12).indices for _ in range(50)])
    assert CLEAN[drawn].float().mean() > 0.99


def test_too_few_weights_are_filled_up_with_pairs_of_weight_0(ledger):
    """Nobody fits: a scale so large that the weights of mismatched pairs vanish in any precision."""
    strategy, scores = make_strategy("noisy_channel"), make_scores(3000.0)
    selection = strategy.select(scores, ledger, 30)
    weights = torch.zeros(PAIRS).index_put((selection.indices,), selection.weights)
    assert len(selection.indices) == 30 and selection.weights.isfinite().all()
    assert CLEAN[selection.indices].sum() == CLEAN.sum() and (weights[~CLEAN] < 1e-6).all()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_share_moves_by_all_candidates_once_a_step(kind, ledger):
    strategy, scores = make_strategy("noisy_channel"), make_scores(4.0, kind)
    posterior, evidence = written_out(scores, 0.5)
    for _ in range(2):  # two micro-batches
        measured = strategy.measure(scores, ledger)
        strategy.record(scores.sample_id, scores.correlation, ledger, measured)
        strategy.observe(strategy.summarize(measured))
    torch.testing.assert_close(ledger.read("evidence", scores.sample_id), evidence.float(), rtol=1e-3, atol=1e-3)
    assert strategy.channel.pi == 0.5
    strategy.begin_step()
    share = 0.49 + 0.02 * posterior.mean().item()
    assert strategy.channel.pi == pytest.approx(share, rel=1e-6)
    assert strategy.pop_logs() == {"selection_estimated_mismatched": pytest.approx(1 - share)}
    assert strategy.compute_figures() == {"estimated_mismatched": pytest.approx(1 - share)}
    strategy.record(scores.sample_id, scores.correlation, ledger)  # nothing was measured
    strategy.begin_step()
    assert strategy.channel.pi == pytest.approx(share, rel=1e-6)


def test_an_over_confident_model_is_tempered_from_the_second_step_on(ledger):
    generator, strategy = torch.Generator().manual_seed(0), make_strategy("noisy_channel")
    embeds = F.normalize(torch.randn(2, PAIRS, 16, generator=generator), dim=-1)
    scores = CandidateScores(torch.arange(PAIRS), *embeds, 100.0)
    before = strategy.measure(scores, ledger)
    strategy.record(scores.sample_id, scores.correlation, ledger, before)
    strategy.observe(strategy.summarize(before))
    strategy.begin_step()
    tau, logits = strategy.channel.temperature.value, embeds[1] @ embeds[0].T * 100
    sigma = ((logits.var(0, correction=0).mean() + logits.var(1, correction=0).mean()) / 2).sqrt().item()
    assert tau == pytest.approx(2.5 / sigma) and tau < 0.2
    assert strategy.measure(scores, ledger)["posterior"].median() > 4 * before["posterior"].median()
    assert strategy.pop_logs()["selection_evidence_temperature"] == tau


RUNS = {
    "accumulation": dict(gradient_accumulation_steps=2),
    "stream": dict(stream=True),
    "over-confident": dict(),
    "gradient caching, a bad row, global": dict(grad_cache_chunk_size=2, bad_row=True, selection_scope="global"),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    settings = dict(selection_strategy="noisy_channel", selection_options=None, save_steps=5, max_steps=11)
    whole, resumed = (make_trainer(tmp_path, **settings, **RUNS[run]) for _ in range(2))
    if run == "over-confident":
        whole.model.logit_scale.data.fill_(math.log(100))
        state = whole.strategy.channel.temperature.state_dict()
        whole.strategy.channel.temperature.load_state_dict(state | {"likelihoods": state["likelihoods"][:-1] + [9.0]})
    whole.train()
    assert (whole.strategy.channel.temperature.value < 1) is (run == "over-confident")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.strategy.state_dict() == whole.strategy.state_dict() and whole.strategy.channel.pi != 0.5
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert one.equal(other)
    column = whole.ledger.column("evidence")
    torch.testing.assert_close(resumed.ledger.column("evidence"), column, rtol=0, atol=0, equal_nan=True)
    assert column.isfinite().sum() >= 63
