import pytest
import torch
import torch.nn.functional as F
from testing.written_out_selection import scores_of

from hf_dissect.selection import STRATEGIES, CandidateScores, SampleLedger, make_strategy


@pytest.fixture
def scores() -> CandidateScores:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    text = F.normalize(image + 0.7 * torch.randn(12, 8, generator=generator), dim=-1)
    return CandidateScores(torch.arange(100, 112), image, text, logit_scale=10.0)


@pytest.fixture
def ledger() -> SampleLedger:
    return SampleLedger(
        200,
        columns=("correlation", *sorted({column for strategy in STRATEGIES.values() for column in strategy.columns})),
    )


def written_out_losses(scores: CandidateScores) -> torch.Tensor:
    """Mean of the two directions' cross-entropies, pair by pair."""
    losses = []
    for i in range(scores.num_candidates):
        to_images = [10 * float(scores.text_embeds[i] @ image) for image in scores.image_embeds]
        to_texts = [10 * float(scores.image_embeds[i] @ text) for text in scores.text_embeds]
        both = [torch.logsumexp(torch.tensor(row), 0) - row[i] for row in (to_images, to_texts)]
        losses.append(float(sum(both)) / 2)
    return torch.tensor(losses)


def test_correlation_is_the_clipped_cosine_in_per_cent(scores):
    cosine = [float(a @ b) for a, b in zip(scores.image_embeds, scores.text_embeds, strict=True)]
    assert scores.correlation.tolist() == pytest.approx([max(100 * value, 0) for value in cosine], abs=1e-4)
    opposite = CandidateScores(scores.sample_id, scores.image_embeds, -scores.image_embeds)
    assert opposite.correlation.tolist() == [0.0] * 12


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_keeps_k_different_candidates_in_order(name, scores, ledger):
    strategy = make_strategy(name)
    scores.reference = scores_of(1) if strategy.reference else None
    for epoch in range(3):
        strategy.on_epoch_begin(epoch, ledger)
        kept = strategy.select(scores, ledger, 5).indices
        assert len(kept) == (12 if strategy.keeps_all else 5)
        assert kept.tolist() == sorted(set(kept.tolist()))
        strategy.record(scores.sample_id, scores.correlation, ledger)


def test_loss_ranks_keep_the_ends_of_the_loss(scores, ledger):
    order = written_out_losses(scores).argsort().tolist()
    assert make_strategy("small_loss").select(scores, ledger, 4).indices.tolist() == sorted(order[:4])
    assert make_strategy("big_loss").select(scores, ledger, 4).indices.tolist() == sorted(order[-4:])


def test_sigmoid_loss_per_pair(scores):
    scores.kind, scores.logit_bias = "sigmoid", -3.0
    expected = []
    for i, text in enumerate(scores.text_embeds):
        terms = []
        for j, image in enumerate(scores.image_embeds):
            logit = 10 * float(text @ image) - 3
            terms.append(float(F.softplus(torch.tensor(-logit if i == j else logit))))
        expected.append(sum(terms))
    assert scores.loss.tolist() == pytest.approx(expected, rel=1e-4)


def test_clipscore_keeps_the_highest_correlation(scores, ledger):
    best = scores.correlation.argsort(descending=True)[:3].sort().values
    assert make_strategy("clipscore").select(scores, ledger, 3).indices.equal(best)


def test_random_depends_on_its_generator_alone(scores, ledger):
    strategy = make_strategy("random")
    before = torch.get_rng_state()
    chosen = []
    for seed in (1, 2, 1):
        strategy.generator.manual_seed(seed)
        chosen.append(strategy.select(scores, ledger, 4).indices.tolist())
    assert chosen[0] == chosen[2] != chosen[1]
    assert torch.get_rng_state().equal(before)


def test_warmup_variant_freezes_the_last_warmup_score_and_keeps_the_largest_fall(scores, ledger):
    strategy = make_strategy("dissect", warmup_epochs=2)
    assert [strategy.needs_scores(epoch) for epoch in range(4)] == [False, True, True, True]
    history = scores.correlation + torch.linspace(-5, 5, 12)[torch.randperm(12)]
    strategy.on_epoch_begin(1, ledger)
    strategy.record(scores.sample_id, history, ledger)
    strategy.on_epoch_begin(2, ledger)
    selection = strategy.select(scores, ledger, 5)
    fall = history - scores.correlation
    assert selection.indices.equal(fall.argsort(descending=True)[:5].sort().values)
    assert selection.priority.tolist() == pytest.approx(fall.tolist(), abs=1e-4)
    strategy.record(scores.sample_id, torch.zeros(12), ledger)
    assert ledger.read("history", scores.sample_id).equal(history)


def test_warmup_trains_a_random_subset_or_all(scores, ledger):
    subset = make_strategy("dissect", warmup_epochs=1)
    chosen = []
    for seed in range(3):
        subset.generator.manual_seed(seed)
        chosen.append(tuple(subset.select(scores, ledger, 6).indices.tolist()))
    assert len(set(chosen)) > 1 and all(len(part) == 6 for part in chosen)
    everything = make_strategy("dissect", warmup_epochs=1, warmup_on="all")
    assert len(everything.select(scores, ledger, 6).indices) == 12


def test_a_pair_without_history_is_neutral(scores, ledger):
    strategy = make_strategy("dissect", warmup_epochs=1)
    fall = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1])
    ledger.write("history", scores.sample_id[:11], scores.correlation[:11] + fall)
    strategy.on_epoch_begin(1, ledger)
    priority = strategy.select(scores, ledger, 6).priority
    assert priority[11] == pytest.approx(4.0, abs=1e-3)
    assert 11 in strategy.select(scores, ledger, 7).indices
    assert 11 not in strategy.select(scores, ledger, 5).indices


def test_a_batch_without_any_history_is_random(scores, ledger):
    strategy = make_strategy("dissect", variant="momentum")
    chosen = set()
    for seed in range(20):
        strategy.generator.manual_seed(seed)
        chosen.add(tuple(strategy.select(scores, ledger, 3).indices.tolist()))
    assert len(chosen) > 10


def test_momentum_variant_starts_at_the_first_score_and_averages(scores, ledger):
    strategy = make_strategy("dissect", variant="momentum", momentum=0.9)
    assert strategy.needs_scores(0)
    first, second = torch.full((12,), 20.0), torch.full((12,), 30.0)
    strategy.record(scores.sample_id, first, ledger)
    assert ledger.read("history", scores.sample_id).tolist() == [20.0] * 12
    strategy.record(scores.sample_id, second, ledger)
    assert ledger.read("history", scores.sample_id).tolist() == pytest.approx([0.9 * 20 + 0.1 * 30] * 12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("disect", {}, "selection_strategy='disect': choose one of dissect, random"),
        ("random", {"variant": "momentum"}, "selection_options=.*variant"),
        ("dissect", {"variant": "slow"}, "variant='slow' is not allowed; allowed: warmup, momentum"),
        ("dissect", {"warmup_on": "none"}, "warmup_on='none'"),
        ("dissect", {"warmup_epochs": 0}, "warmup_epochs=0"),
        ("dissect", {"momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_impossible_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_strategy(name, **options)
