"""Penalty of usage: counts of visits, chances of candidates, and runs that balance how often pairs train."""

import pytest
import torch
from testing.faulty_run import make_trainer

from hf_dissect import DissectTrainingArguments, OnlineSelector, Selection, SelectionStrategy, make_strategy
from hf_dissect.recipe import Recipe, RecipeError
from hf_dissect.selection import STRATEGIES, SampleLedger
from hf_dissect.selection.inclusion import find_inclusion
from hf_dissect.selection.options import USAGE, WITH_REFERENCE
from hf_dissect.selection.scoring import CandidateScores
from hf_dissect.selection.strategy import keep_largest
from hf_dissect.selection.usage import choose_pairs, count_visits, measure_spread, penalise_plan, set_usage_penalty

N = 24


class Ranks(SelectionStrategy):
    """Ranks by given priorities."""

    name, usage = "ranks", "choice"

    def __init__(self, priority):
        super().__init__()
        self.priority = priority

    def select(self, scores, ledger, k):
        return keep_largest(self.priority[scores.sample_id], k)

    def plan(self, ledger):
        return self.priority.clone()


def ledger_of(visits) -> SampleLedger:
    ledger = SampleLedger(len(visits), columns=("correlation", "visits"))
    ledger.write("visits", torch.arange(len(visits)), torch.as_tensor(visits, dtype=torch.float32))
    return ledger


def penalised(strategy, penalty=1.0):
    set_usage_penalty(strategy, penalty)
    return strategy


def run(strategy, steps, batch=8, k=4, n=N):
    """Visits of each pair after some steps on random batches."""
    ledger = SampleLedger(n, columns=("correlation", "visits"))
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        ids = torch.randperm(n, generator=order)[:batch]
        strategy.generator.manual_seed(step)
        chosen = choose_pairs(strategy, CandidateScores(ids), ledger, k).indices
        assert len(chosen) == k and (chosen.diff() > 0).all()
        count_visits(ids[chosen], {}, ledger)
    return ledger.column("visits").nan_to_num(0)


def test_a_ranking_is_that_of_the_priority_minus_the_handicap_in_units_of_its_spread():
    priority = torch.randn(N, generator=torch.Generator().manual_seed(1)) * 50
    visits = torch.arange(N) % 5
    ids = torch.randperm(N, generator=torch.Generator().manual_seed(2))[:12]
    selection = choose_pairs(penalised(Ranks(priority), 0.7), CandidateScores(ids), ledger_of(visits), 5)
    own = priority[ids]
    expected = own - 0.7 * own.double().std(correction=0) * torch.log(1 + visits[ids])
    assert selection.indices.tolist() == sorted(expected.argsort(descending=True)[:5].tolist())
    torch.testing.assert_close(selection.priority, expected.float())
    plain = choose_pairs(Ranks(priority), CandidateScores(ids), ledger_of(visits), 5)
    assert plain.indices.tolist() == sorted(own.argsort(descending=True)[:5].tolist())


def test_equal_priorities_visit_every_pair_equally_often():
    visits = run(penalised(Ranks(torch.zeros(N)), 0.1), 60)
    assert visits.sum() == 60 * 4 and visits.max() - visits.min() <= 2, visits


def test_a_random_choice_becomes_a_draw_by_visits():
    visits = torch.tensor([0.0, 0, 1, 3, 7, 7, 15, 31])
    expected = find_inclusion((1 + visits) ** -1.5, 3)
    strategy, counts = penalised(make_strategy("random"), 1.5), torch.zeros(8)
    for step in range(4000):
        strategy.generator.manual_seed(step)
        counts[choose_pairs(strategy, CandidateScores(torch.arange(8)), ledger_of(visits), 3).indices] += 1
    torch.testing.assert_close(counts / 4000, expected.float(), atol=0.03, rtol=0)
    evened, plain = run(penalised(make_strategy("random"), 3.0), 200), torch.zeros(N)
    assert evened.std() < 0.5 * (200 * 4 / N * (1 - 4 / N)) ** 0.5, "less than that of independent draws"
    assert plain.sum() == 0


def scores_of(n=8, seed=0, reference=False):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=-1) for _ in range(2))
    scores = CandidateScores(torch.arange(n), images, texts, torch.tensor(5.0), torch.tensor(0.0), "softmax")
    if reference:
        scores.reference = scores_of(n, seed + 1)
    return scores


def test_rules_that_draw_divide_their_chances():
    visits = torch.tensor([0.0, 1, 3, 7, 0, 1, 3, 7])
    ledger = ledger_of(visits)
    ledger = SampleLedger(8, columns=("correlation", "visits", "loss", "evidence"))
    ledger.write("visits", torch.arange(8), visits)
    for name, options in (("info_batch", {}), ("noisy_channel", {})):
        strategy, counts, weights = penalised(make_strategy(name, **options), 1.0), torch.zeros(8), torch.zeros(8)
        for step in range(3000):
            strategy.generator.manual_seed(step)
            selection = choose_pairs(strategy, scores_of(), ledger, 3)
            counts[selection.indices] += 1
            weights[selection.indices] += selection.weights
        base = torch.ones(8) if name == "info_batch" else strategy.channel.weigh(strategy._find_posterior(scores_of()))
        torch.testing.assert_close(
            counts / 3000, find_inclusion(base / (1 + visits), 3).float(), atol=0.035, rtol=0, msg=name
        )
        # The weights of the losses make up for it: on average, each pair weighs what it does without a penalty.
        expected = torch.full((8,), 3 / 8) if name == "info_batch" else base.float()
        torch.testing.assert_close(weights / 3000, expected, atol=0.06, rtol=0.12, msg=name)
    few, many = (penalised(make_strategy("jest", chunks=1), penalty) for penalty in (1e-9, 6.0))
    counts = torch.zeros(2, 8)
    for step in range(300):
        for place, strategy in enumerate((few, many)):
            strategy.generator.manual_seed(step)
            counts[place, choose_pairs(strategy, scores_of(reference=True), ledger, 2).indices] += 1
    assert (counts[1][[0, 4]] > 250).all() and (counts[0] > 20).all()  # a first block is uniform without a penalty


def test_a_plan_ranks_by_visits_too():
    priority = torch.tensor([4.0, 3, float("nan"), 1, 0, 2])
    visits = torch.tensor([9.0, 0, 0, 0, 0, float("nan")])
    ledger = SampleLedger(6, columns=("planned", "visits"))
    ledger.replace("planned", priority)
    ledger.replace("visits", visits)
    penalise_plan(penalised(Ranks(priority), 1.0), ledger, "planned")
    planned = ledger.column("planned")
    spread = priority[~priority.isnan()].double().std(correction=0)
    torch.testing.assert_close(
        planned, (priority - spread * torch.log(1 + visits.nan_to_num(0))).float(), equal_nan=True
    )
    assert measure_spread(torch.full((3,), 7.0)) == measure_spread(torch.full((2,), float("nan"))) == 1.0


def test_every_strategy_takes_it_or_is_refused_by_name():
    assert {name for name, kind in STRATEGIES.items() if kind.usage} == set(USAGE)
    for name, kind in STRATEGIES.items():
        assert kind.usage == USAGE.get(name, "")
        if name in USAGE:
            assert make_strategy(name, usage_penalty=0.5).columns[-1] == "visits"
            assert "visits" not in make_strategy(name).columns
            continue
        with pytest.raises(
            ValueError, match=f"usage_penalty=0.5 does not go with the strategy {name}, which .*; set it to 0"
        ):
            make_strategy(name, usage_penalty=0.5)
        with pytest.raises(ValueError, match=f"does not go with the strategy {name}, which .*; set it to 0, or take"):
            DissectTrainingArguments("x", selection_strategy=name, selection_usage_penalty=0.5, use_cpu=True)


class Unsaid(SelectionStrategy):
    name = "unsaid"

    def select(self, scores, ledger, k):
        return Selection(torch.arange(k))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "none"}, "selection.usage_penalty: 0.5 does not go with the strategy none, which keeps all"),
        ({"ratio": 1.0}, "selection.usage_penalty: 0.5 would change nothing: a ratio of 1 keeps all pairs"),
        ({"strategy": "noisy_channel", "rescore_every": 3}, "does not go with rescore_every 3 and the strategy noisy"),
        ({"usage_penalty": -1}, "selection.usage_penalty: -1 is not allowed"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    recipe = {"name": "x", "model": {"config": {"model_type": "clip"}}}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({**recipe, "selection": {"usage_penalty": 0.5, "strategy": "small_loss", **settings}})
    assert message in str(caught.value)
    made = Recipe.from_dict({**recipe, "selection": {"usage_penalty": 0.5, "strategy": "small_loss"}})
    assert made.with_strategy("none").selection.usage_penalty == 0.0
    assert made.with_strategy("random").selection.usage_penalty == 0.5
    with pytest.raises(ValueError, match="unsaid, which does not say.*says by its attribute `usage` how it takes it"):
        set_usage_penalty(Unsaid(), 1.0)


@pytest.mark.parametrize("name", [name for name in USAGE if name not in WITH_REFERENCE])
def test_the_column_counts_what_trained_in_a_run_of_each_strategy(name, tmp_path):
    options = {"variant": "momentum"} if name == "dissect" else {}
    trainer = make_trainer(
        tmp_path, selection_strategy=name, selection_options=options, selection_usage_penalty=1.0, max_steps=20,
        eval_strategy="no", save_strategy="no", check_reload=False,
    )  # fmt: skip
    trained = torch.zeros(64)
    step = trainer.training_step

    def counted(model, inputs, *rest):
        trained[inputs["sample_id"]] += 1
        return step(model, inputs, *rest)

    trainer.training_step = counted
    trainer.train()
    assert torch.equal(trainer.ledger.column("visits").nan_to_num(0), trained) and trained.sum() >= 20 * 4
    logs = [entry for entry in trainer.state.log_history if "selection_visits_kept" in entry]
    figures = trainer.run_metrics({})["selection"]
    assert logs[-1]["selection_visits_kept"] > logs[0]["selection_visits_kept"] and figures["visits_kept"] > 0


def test_given_strategies_get_the_penalty_of_the_arguments_and_loops_their_own(tmp_path):
    settings = {"selection_strategy": "random", "selection_options": None}
    trainer = make_trainer(tmp_path, **settings, selection_usage_penalty=0.5)
    assert trainer.strategy.usage_penalty == 0.5 and "visits" in trainer.ledger.columns
    own = Ranks(torch.zeros(64))
    trainer.args.make_strategy(own)
    assert own.usage_penalty == 0.5
    selector = OnlineSelector("random", num_samples=16, usage_penalty=2.0)
    assert selector.strategy.usage_penalty == 2.0 and "visits" in selector.ledger.columns


@pytest.mark.parametrize(
    "settings",
    [
        {"selection_strategy": "random"},
        {"selection_strategy": "small_loss", "selection_rescore_every": 3},
        {"selection_strategy": "noisy_channel", "stream": True},
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_same(settings, tmp_path):
    common = dict(
        selection_usage_penalty=1.0, selection_options=None, max_steps=24, save_steps=10, eval_strategy="no",
        check_reload=False,
    )  # fmt: skip
    whole = make_trainer(tmp_path / "a", **{**common, **settings})
    whole.train()
    resumed = make_trainer(tmp_path / "a", **{**common, **settings})
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert set(whole.ledger.columns) == set(resumed.ledger.columns) >= {"visits"}
    for name in whole.ledger.columns:
        one, other = (
            dict(zip(ledger.ids.tolist(), ledger.column(name).nan_to_num(-1).tolist(), strict=True))
            for ledger in (whole.ledger, resumed.ledger)
        )
        assert one == other, name
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.monitor.run.figures() == resumed.monitor.run.figures()
