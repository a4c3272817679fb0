import copy

import pytest
import torch
from testing import tiny_models

from hf_dissect import SampleLedger
from hf_dissect.selection import CandidateScores, make_strategy
from hf_dissect.selection.past_model import PastModel


def weights_over_steps(steps: int) -> list[torch.Tensor]:
    return [torch.randn(3, 2, generator=torch.Generator().manual_seed(step)) for step in range(steps)]


def copy_of(past: PastModel, model: torch.nn.Module) -> torch.Tensor:
    with past.in_place_of(model):
        return model.weight.detach().clone()


def run(past: PastModel, steps: int, check=lambda step, model: None) -> torch.nn.Module:
    model = torch.nn.Linear(2, 3, bias=False)
    for step, weight in enumerate(weights_over_steps(steps)):
        model.weight.data.copy_(weight)
        past.update(model)
        check(step, model)
    return model


def test_the_average_is_the_written_out_one():
    weights, past, wanted = weights_over_steps(9), PastModel("average", 0.8, 4), []
    for weight in weights:
        wanted.append(weight if not wanted else 0.8 * wanted[-1] + 0.2 * weight)

    def check(step, model):
        torch.testing.assert_close(copy_of(past, model), wanted[step])
        assert model.weight.equal(weights[step])  # back in its place
        assert past.is_ready == (step >= 4)

    run(past, 9, check)


@pytest.mark.parametrize("every", [None, 2, 3])
def test_the_snapshot_is_that_of_the_end_of_the_warm_up_or_of_every_so_many_steps(every):
    weights, past = weights_over_steps(12), PastModel("snapshot", 0.9, 3, every)

    def check(step, model):
        taken = 3 if every is None else 3 + (step - 3) // every * every
        # A snapshot of this very step has no past to compare with.
        assert past.is_ready == (step > 3 and step != taken)
        if step >= 3:
            assert copy_of(past, model).equal(weights[taken])

    run(past, 12, check)


def test_a_saved_copy_continues_the_same():
    whole, first, second = (PastModel("average", 0.7, 2) for _ in range(3))
    model, weights = run(whole, 8), weights_over_steps(8)
    run(first, 5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other = torch.nn.Linear(2, 3, bias=False)
    for weight in weights[5:]:
        other.weight.data.copy_(weight)
        second.update(torch.nn.DataParallel(other))  # names have no prefix of a wrapper
    assert copy_of(whole, model).equal(copy_of(second, other)) and second.is_ready


def test_an_adapter_is_copied_without_its_base_and_batch_norm_with_its_statistics():
    adapted = tiny_models.with_lora(tiny_models.tiny_clip()[0])
    past = PastModel("average", 0.9, 1)
    past.update(adapted)
    numbers = sum(weight.numel() for weight in past.state_dict()["copy"].values())
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert numbers == trained < 2000
    model, past = torch.nn.BatchNorm1d(2), PastModel("snapshot", 0.9, 1)
    for step in range(3):
        model.running_mean.fill_(step)
        past.update(model)
    with past.in_place_of(model):
        assert model.running_mean.tolist() == [1, 1]
    assert model.running_mean.tolist() == [2, 2]


def test_an_error_while_scoring_leaves_the_weights_in_place():
    past = PastModel("average", 0.5, 1)
    model = run(past, 3)
    with pytest.raises(KeyError), past.in_place_of(model):
        raise KeyError
    assert model.weight.equal(weights_over_steps(3)[2])


def test_weights_that_are_split_over_processes_are_refused():
    model = torch.nn.Linear(2, 3)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match="selection.options.history: a copy .* DeepSpeed"):
        PastModel("average", 0.5, 1).update(model)


def test_the_differential_is_to_the_score_by_the_earlier_model():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(12, 4, generator=generator)) for _ in range(2))
    scores = CandidateScores(torch.arange(12), image, text)
    strategy = make_strategy("dissect", history="average", warmup_epochs=0)
    ledger = SampleLedger(12, columns=("correlation", "history"))
    assert strategy.warmup_epochs == 0 and not strategy.needs_scores(5)
    assert len({tuple(strategy.select(scores, ledger, 3).indices.tolist()) for _ in range(20)}) > 10
    scores.past_correlation = torch.rand(12, generator=generator) * 50
    fall = [float(scores.past_correlation[i]) - max(100 * float(image[i] @ text[i]), 0) for i in range(12)]
    selection = strategy.select(scores, ledger, 5)
    assert selection.priority.tolist() == pytest.approx(fall, abs=1e-4)
    assert selection.indices.tolist() == sorted(sorted(range(12), key=lambda i: -fall[i])[:5])
    strategy.record(scores.sample_id, scores.correlation, ledger, strategy.measure(scores, ledger))
    assert ledger.column("history").equal(scores.past_correlation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": "ledgers"}, "history='ledgers' is not allowed; allowed: ledger, average, snapshot"),
        ({"history": "average", "average_momentum": 1.0}, "average_momentum=1.0 is not allowed"),
        ({"history": "average", "model_warmup_steps": 0}, "model_warmup_steps=0 is not allowed; allowed: at least 1"),
        ({"history": "average", "snapshot_every": 9}, "snapshot_every=9 has no effect with history: average"),
        ({"history": "snapshot", "average_momentum": 0.5}, "average_momentum=0.5 has no effect with .*: snapshot"),
        ({"model_warmup_steps": 5}, "model_warmup_steps=5 has no effect .* set history to average or snapshot"),
        ({"history": "snapshot", "variant": "momentum"}, "variant='momentum' averages scores in the ledger"),
        ({"history": "snapshot", "snapshot_every": 1}, "snapshot_every=1 is not allowed"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_strategy("dissect", **options)
