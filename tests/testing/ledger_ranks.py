"""Called by test_sharded_ledger.py in several processes: a ledger split over them is, value for value, a whole one."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.data import shuffle_captions
from hf_dissect.distributed import Ranks
from hf_dissect.selection import SampleLedger, make_strategy
from hf_dissect.selection.ledger_access import LedgerAccess, ShardAccess
from hf_dissect.selection.saved_ledger import LEDGER_FILE
from hf_dissect.selection.sharded_ledger import ShardedLedger
from testing import tiny_models

COLUMNS = ("correlation", "history", "learnt", "forgotten")
POOL = torch.randint(2**63 - 1, (300,), generator=torch.Generator().manual_seed(3))
POOL[:5] = torch.tensor([0, 1, 2**31, 2**31 + 1, 2**63 - 1])


def check_ledger(folder: Path) -> float:
    """Steps with repeated ids, and with ranks that have none, leave the same values in both; return the own share."""
    ranks = Ranks(Accelerator(cpu=True))
    for fewest_of_grid in (16, 2):  # packets go straight, and in stages where there is a grid
        whole = SampleLedger(None, COLUMNS)
        split = ShardedLedger(ranks, COLUMNS, fewest_of_grid)
        ways = LedgerAccess(whole, ranks), ShardAccess(split, ranks)
        generator = torch.Generator().manual_seed(0)
        for step in range(14):
            sizes = torch.randint(12, (ranks.count,), generator=generator)
            sizes[step % ranks.count] *= step % 3 > 0
            if step == 5:
                sizes.zero_()
            draws = [POOL[torch.randint(60 if step % 2 else 300, (n,), generator=generator)] for n in sizes.tolist()]
            values = [torch.rand(len(part), generator=generator) for part in draws]
            ids, value = draws[ranks.own], values[ranks.own]
            strategies = make_strategy("dissect", variant="momentum"), make_strategy("forgetting")
            seen = []
            for way in ways:
                route = way.plan(ids) if step % 2 else None
                places = None if route is None else int(ranks.gather_numbers(route.fullest).max())
                way.fetch(ids, route, places)

                def record(sample_id, columns, ledger, strategies=strategies):
                    ledger.write("correlation", sample_id, columns["correlation"])
                    for strategy in strategies:
                        strategy.record(sample_id, columns["correlation"], ledger, {"learnt": columns["learnt"]})

                read = [way.ledger.read(name, ids) for name in COLUMNS]
                read.append(way.ledger.read("history", ids.flip(0)[::2]))
                columns = {"sample_id": ids, "correlation": value, "learnt": (value > 0.5).float()}
                sums = torch.tensor([value.double().sum(), 0.1 * ranks.own])
                is_fetched = step % 3 == 0
                way.record(
                    columns, sizes.tolist(), record, sums, lambda total, read=read: read.append(total), is_fetched
                )
                way.wait()
                seen.append(read)
            for one, other in zip(*seen, strict=True):
                assert_same(one, other)
        order = whole.ids.argsort()
        assert split and len(split) == len(whole) and torch.equal(split.ids, whole.ids[order])
        some = POOL[::7]
        for name in COLUMNS:
            assert_same(split.column(name), whole.column(name)[order])
            assert_same(split.read_anywhere(name, some), whole.read(name, some))
        both = (ledger.find_known("history", "learnt") for ledger in (split, whole))
        for one, other in zip(*both, strict=True):
            assert_same(one, other)
        assert split.compute_mean("history") == whole.compute_mean("history")
        for ledger in (split, whole):
            ledger.write("history", some, torch.arange(float(len(some))))
            ledger.replace("learnt", ledger.column("history") * 2)
        assert_same(split.column("learnt"), whole.column("learnt")[whole.ids.argsort()])
        own_share = len(split.own) / len(split)
        check_refusals(split, ranks)
    check_files(split, whole, folder, ranks)
    return own_share


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def check_refusals(split: ShardedLedger, ranks: Ranks) -> None:
    split.fetch(split.plan(POOL[:3]))
    assert len(split.read("history", POOL[1:2])) == 1
    for ids, name in ((POOL[:4], "history"), (POOL[3:4], "correlation")):
        assert "not of the current step" in error_of(lambda ids=ids, name=name: split.read(name, ids))
    assert "has no column 'loss'" in error_of(lambda: split.read("loss", POOL[:3]))
    assert "sample_id -7 is negative" in error_of(
        lambda: split.write("history", torch.tensor([4, -7]), torch.zeros(2))
    )
    assert "ask for different pairs" in error_of(lambda: split.read_anywhere("history", POOL[: 1 + ranks.own]))
    # One rank alone has a negative id, and all of them end with its error instead of waiting.
    other = ShardedLedger(ranks, COLUMNS)
    other.fetch(other.plan(torch.tensor([5, -9 if ranks.own == 1 else 6])))
    assert "sample_id -9 is negative" in error_of(lambda: other.read("history", torch.tensor([5])))
    other.fetch(other.plan(torch.tensor([5])))
    assert "sample_id -9 is negative" in error_of(other.wait), "nothing comes after a failed exchange"


def error_of(function) -> str:
    try:
        function()
    except (ValueError, KeyError, FileNotFoundError) as error:
        return str(error)
    return "no error"


def check_files(split: ShardedLedger, whole: SampleLedger, folder: Path, ranks: Ranks) -> None:
    """Shards of any number of ranks, and whole files, are read by any number of ranks."""
    place = folder / f"of-{ranks.count}"
    place.mkdir(exist_ok=True)
    split.save(place / LEDGER_FILE, {"epoch": 2})
    if ranks.own == 0:
        (folder / "whole").mkdir(exist_ok=True)
        whole.save(folder / "whole" / LEDGER_FILE, {"epoch": 2})
    ranks.wait()
    wanted = {name: split.column(name) for name in COLUMNS}
    for saved in sorted(folder.glob("of-*")) + [folder / "whole"]:
        if saved.name > place.name and saved.name != "whole":
            continue
        loaded = ShardedLedger(ranks, (*COLUMNS, "of_another_strategy"))
        loaded.write("history", torch.tensor([99]), torch.ones(1))  # is forgotten
        assert loaded.load(saved / LEDGER_FILE) == {"epoch": 2}
        alone = SampleLedger(None, COLUMNS)
        assert alone.load(saved / LEDGER_FILE) == {"epoch": 2}
        if saved in (place, folder / "whole"):
            for name in COLUMNS:
                assert_same(loaded.column(name), wanted[name])
                assert_same(alone.read(name, loaded.ids), wanted[name])
        assert loaded.column("of_another_strategy").isnan().all()
        assert loaded.is_own(loaded.own.ids).all()
    assert "No ledger at" in error_of(lambda: split.load(folder / "nowhere" / LEDGER_FILE))
    SampleLedger(7).save(folder / f"rows-{ranks.own}.safetensors")
    assert "holds 7 pairs, this run has arbitrary ids" in error_of(
        lambda: split.load(folder / f"rows-{ranks.own}.safetensors")
    )
    ranks.wait()
    if ranks.count == 3:
        check_lost_shard(split, place, ranks)


def check_lost_shard(split: ShardedLedger, place: Path, ranks: Ranks) -> None:
    path, lost = place / LEDGER_FILE, place / "ledger-00001-of-00003.safetensors"
    content = lost.read_bytes()
    ranks.wait()
    if ranks.own == 0:
        lost.write_bytes(content[: len(content) // 2])
    ranks.wait()
    assert "ledger-00001-of-00003.safetensors is not a readable" in error_of(lambda: split.load(path))
    if ranks.own == 0:
        lost.unlink()
    ranks.wait()
    assert "lacks ledger-00001-of-00003.safetensors" in error_of(lambda: split.load(path))
    assert "lacks ledger-00001-of-00003.safetensors" in error_of(lambda: SampleLedger(None, COLUMNS).load(path))
    ranks.wait()
    if ranks.own == 0:
        lost.write_bytes(content)
    ranks.wait()


# ---- whole runs ----

RUNS = {
    "dissect": dict(selection_strategy="dissect", selection_options={"variant": "momentum"}),
    "dissect-global": dict(selection_strategy="dissect", selection_scope="global", selection_warmup_epochs=1),
    "ncr": dict(selection_strategy="ncr", division={}, selection_ratio=1.0),
    "ncr-global": dict(selection_strategy="ncr", selection_scope="global"),
    "channel": dict(selection_strategy="noisy_channel", gradient_accumulation_steps=2, repair={}),
    "channel-global": dict(selection_strategy="noisy_channel", selection_scope="global"),
    "gsc": dict(selection_strategy="none", gsc={"warmup_epochs": 1, "evidence": "posterior"}),
    "gsc-global": dict(selection_strategy="gsc", selection_scope="global", record_selection=False),
    "info-batch": dict(selection_strategy="info_batch", stream=True),
    "forgetting": dict(selection_strategy="forgetting", stream=True, selection_scope="global"),
    "random": dict(selection_strategy="random", noisy_channel={}),
    "plan": dict(selection_strategy="noisy_channel", selection_rescore_every=2),
    "usage": dict(selection_strategy="dissect", selection_usage_penalty=1.0),
    "usage-global": dict(
        selection_strategy="random", selection_scope="global", selection_usage_penalty=2.0, stream=True
    ),
    "usage-plan": dict(selection_strategy="dissect", selection_rescore_every=2, selection_usage_penalty=1.0),
    "plan-stream": dict(selection_strategy="gsc", selection_rescore_every=2, stream=True),
}


def make_trainer(folder: Path, *, stream: bool = False, **settings) -> DissectTrainer:
    """A trainer on pairs that are known by keys; the picture of one cannot be read."""
    model, processor = tiny_models.tiny_clip()
    pairs = shuffle_captions(tiny_models.tiny_pairs(48), rate=0.25)
    rows = pairs.to_list()
    rows[7]["caption"] = None
    # Three rows of the stream are one pair, which may come twice in a step.
    keys = [f"pair {max(3, number) if stream else number}" for number in range(48)]
    pairs = type(pairs).from_list(rows, features=pairs.features).add_column("key", keys)
    defaults = {
        "selection_strategy": "dissect",
        "id_column": "key",
        "record_selection": True,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "max_steps": 10 if stream else -1,
        "shuffle_buffer": 8,
        "max_bad_fraction": 0.1,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "save_run_folder": False,
        "check_reload": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=pairs.to_iterable_dataset(4) if stream else pairs,
        args=DissectTrainingArguments(str(folder), **{**defaults, **settings}),
    )


def content_of(trainer: DissectTrainer) -> dict[str, object]:
    """All that a run leaves: the same on every rank."""
    ledger, ranks = trainer.ledger, trainer.ranks
    order = ledger.ids.argsort()
    ranks.wait()  # for the record
    record = Path(trainer.args.output_dir, "selection.parquet")
    logs = [{key: value for key, value in entry.items() if "time" not in key} for entry in trainer.state.log_history]
    drop = ("train_samples_per_second", "train_steps_per_second", "train_loss")  # the last since the run was resumed
    return {
        "weights": torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]),
        "ids": ledger.ids[order],
        **{f"column {name}": ledger.column(name)[order] for name in ledger.columns},
        "logs": [{key: value for key, value in sorted(entry.items()) if key not in drop} for entry in logs],
        "choices": pq.read_table(record).to_pylist() if trainer.args.record_selection else [],
        "figures": {**trainer.monitor.run.figures(), **trainer.strategy.compute_figures()},
        "histogram": trainer.monitor.score_histogram(),
        "extremes": [trainer.monitor.last_epoch.best_kept, trainer.monitor.last_epoch.worst_dropped],
    }


def assert_same_content(one: dict[str, object], other: dict[str, object], name: str) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(-1), other[key].nan_to_num(-1)), f"{name}: {key} differs"
        else:
            assert repr(value) == repr(other[key]), f"{name}: {key} differs: {value} and {other[key]}"


def check_runs(folder: Path, names: list[str]) -> None:
    for name in names:
        contents = []
        for shards in (True, False):
            trainer = make_trainer(folder / f"{name}-{shards}", shard_ledger=shards, **RUNS[name])
            assert isinstance(trainer.ledger, ShardedLedger) == shards
            trainer.train()
            contents.append(content_of(trainer))
        assert contents[0]["ids"].numel() >= 40 and contents[0]["column correlation"].isfinite().any()
        assert_same_content(*contents, name)


def check_resume(folder: Path) -> None:
    """A run is resumed from the shards of its checkpoint, as an uninterrupted one, with either kind of ledger."""
    settings = {**RUNS["dissect"], "save_strategy": "steps", "save_steps": 5, "stream": True}
    whole = make_trainer(folder / "whole", **settings)
    whole.train()
    wanted = content_of(whole)
    checkpoint = folder / "whole" / "checkpoint-5"
    files = sorted(path.name for path in checkpoint.glob("ledger*"))
    count = whole.ranks.count
    assert files == [f"ledger-{rank:05d}-of-{count:05d}.safetensors" for rank in range(count)]
    for shards in (True, False):
        resumed = make_trainer(folder / "whole", shard_ledger=shards, **settings)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_same_content(content_of(resumed), wanted, f"resumed, shards {shards}")
    finished = make_trainer(folder / "finished", **{**settings, "save_run_folder": True, "max_steps": 4})
    finished.train()
    assert [path.name for path in (folder / "finished").glob("ledger*")] == [LEDGER_FILE]
    figures = []
    for shards in (True, False):
        trainer = make_trainer(
            folder / f"figures-{shards}", **RUNS["gsc"], save_run_folder=True, shard_ledger=shards, num_train_epochs=2
        )
        trainer.train()
        figures.append(json.loads((folder / f"figures-{shards}" / "metrics.json").read_text())["selection"])
    assert figures[0] == figures[1] and figures[0]["label_auroc"] is not None


def check_all_runs(folder: Path) -> None:
    if Ranks(Accelerator(cpu=True)).count == 2:
        check_runs(folder / "two", list(RUNS))
        check_resume(folder / "resumed")
    else:
        check_runs(folder / "more", ["dissect", "channel-global", "gsc"])
