"""Called by test_scope.py in three processes: what they choose together is what one chooses of the union."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from hf_dissect.distributed import Ranks
from hf_dissect.selection import STRATEGIES, CandidateScores, SampleLedger, make_strategy
from hf_dissect.selection.scope import GatheredScores, describe_selection, rebalance, select_from_all, select_from_own
from hf_dissect.selection.uniform import Random

SIZES = [5, 0, 7]  # one rank could read none of its rows


class MeasuresLoss(Random):
    """Looks at the loss among the candidates it is shown."""

    def measure(self, scores, ledger):
        return {"loss": scores.loss}


def check_choices() -> None:
    ranks = Ranks(Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(0)
    total, start = sum(SIZES), sum(SIZES[: ranks.own])
    own = torch.arange(start, start + SIZES[ranks.own])
    image = F.normalize(torch.randn(total, 8, generator=generator), dim=-1)
    text = F.normalize(image + torch.randn(total, 8, generator=generator), dim=-1)
    columns = {column for strategy in STRATEGIES.values() for column in strategy.columns}
    ledger = SampleLedger(1000, columns=("correlation", *sorted(columns)))
    ledger.write("history", torch.arange(total) * 7, 100 * torch.rand(total, generator=generator))

    for kind, bias in (("softmax", 0.0), ("sigmoid", -3.0)):
        union = CandidateScores(torch.arange(total) * 7, image, text, logit_scale=10.0, logit_bias=bias, kind=kind)
        other = CandidateScores(union.sample_id, text.roll(1, 1), image, 7.0, bias, kind)
        gathered = GatheredScores(union.subset(own), SIZES, ranks)
        torch.testing.assert_close(gathered.loss, union.loss)
        assert torch.equal(gathered.correlation, union.correlation) and torch.equal(gathered.text_embeds, text)
        for name in STRATEGIES:
            strategy = make_strategy(name)
            union.reference = other if strategy.reference else None
            strategy.on_epoch_begin(3, ledger)
            strategy.generator.manual_seed(1)
            wanted = strategy.select(union, ledger, 6).indices
            strategy.generator.manual_seed(1)
            kept = select_from_all(strategy, union.subset(own), ledger, SIZES, lambda size: size // 2, ranks)
            assert sum(kept.counts) == len(wanted) and len(kept.indices) == kept.counts[ranks.own]
            rows = own[kept.indices]
            batch = {
                "sample_id": union.sample_id[rows],
                "pixel_values": image[rows],
                "input_ids": torch.full((len(rows), 3 + ranks.own), 9),
                "is_clean": rows % 2 == 0,
            }
            shared = rebalance(batch, kept.counts, ranks, {"input_ids": (5, "left")})
            assert len(shared["sample_id"]) == len(wanted) // 3
            everywhere = ranks.gather(shared["sample_id"])
            assert sorted(everywhere.tolist()) == union.sample_id[wanted].tolist()
            rows = shared["sample_id"] // 7
            assert torch.equal(shared["pixel_values"], image[rows]) and torch.equal(shared["is_clean"], rows % 2 == 0)
            # A caption that was 3 tokens long is now as long as the longest, 5, padded on its left.
            source = torch.where(rows < 5, 0, 2)
            assert [line.count(5) for line in shared["input_ids"].tolist()] == (2 - source).tolist()

    past = CandidateScores(union.sample_id, image, text, past_correlation=torch.rand(total, generator=generator) * 50)
    strategy = make_strategy("dissect", history="average")
    wanted = strategy.select(past, ledger, 6).indices
    kept = select_from_all(strategy, past.subset(own), ledger, SIZES, lambda size: size // 2, ranks)
    chosen = torch.zeros(total).index_fill(0, own[kept.indices], 1.0)
    assert sum(ranks.gather(chosen[None])).nonzero()[:, 0].equal(wanted)
    assert kept.measured["history"].equal(past.past_correlation[own])

    union = CandidateScores(torch.arange(total) * 7, image, text, logit_scale=10.0)
    for sizes in (SIZES, [3, 4, 5]):
        parts = [union.subset(part) for part in torch.arange(total).split(sizes)]
        brought = parts[ranks.own]
        kept = select_from_all(MeasuresLoss(), brought, ledger, sizes, lambda size: 3, ranks)
        columns = ranks.gather_columns(describe_selection(brought, kept, None), sizes)
        assert "loss" not in columns and columns["correlation"].equal(union.correlation)
        torch.testing.assert_close(ranks.gather_columns(kept.measured, sizes), {"loss": union.loss})
        # Where a rank has no candidates, none measures: all are to exchange the same columns.
        kept = select_from_own(MeasuresLoss(), brought, ledger, sizes, lambda size: 2)
        wanted = {"loss": torch.cat([part.loss for part in parts])} if min(sizes) else {}
        measured = ranks.gather_columns(kept.measured, sizes) if kept.measured else {}
        torch.testing.assert_close(measured, wanted)
        unscored = CandidateScores(brought.sample_id)
        kept = select_from_own(MeasuresLoss(), unscored, ledger, sizes, lambda size: 2)
        assert kept.measured == {} and "correlation" not in describe_selection(unscored, kept, None)
