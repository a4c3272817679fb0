"""Small streams whose pairs say where they come from, and loaders of them."""

import itertools
import json
from pathlib import Path

import torch
from datasets import Features, IterableDataset, List, Value

from hf_dissect.data.pairs import as_pairs
from hf_dissect.data.streaming.loader import StreamLoader
from hf_dissect.data.streaming.pair_stream import PairStream
from hf_dissect.data.streaming.parts import Place, StreamPart
from hf_dissect.data_collator import SelectionCollator
from testing import tiny_models

UNEQUAL = (5, 0, 2, 9, 1, 4)


def rows_of_shards(shards, captions):
    for shard, size in shards:
        for row in range(size):
            names = [f"{shard}/{row}/{caption}" for caption in range(captions)]
            yield {"image": f"{shard}/{row}", "caption": names if captions > 1 else names[0]}


def stream_of(sizes=UNEQUAL, captions=1) -> PairStream:
    given = {"shards": list(enumerate(sizes)), "captions": captions}
    caption = List(Value("string")) if captions > 1 else Value("string")
    features = Features({"image": Value("string"), "caption": caption})
    return as_pairs(IterableDataset.from_generator(rows_of_shards, features=features, gen_kwargs=given))


def all_captions(stream):
    return sorted(pair["caption"] for pair in stream)


class LoggingCollator:
    """Captions as bytes of one length; each call is written down, whatever process it is made in."""

    def __init__(self, log=None):
        self.log = log

    def __call__(self, pairs):
        if self.log is not None:
            with open(self.log, "a") as log:
                log.write("".join(f"{pair['caption']}\n" for pair in pairs))
        captions = [list(pair["caption"].encode().ljust(16)) for pair in pairs]
        return {"caption": torch.tensor(captions), "sample_id": torch.tensor([pair["sample_id"] for pair in pairs])}


def captions_of(batch):
    return [bytes(row).decode().strip() for row in batch["caption"].tolist()]


def loader_of(stream, batch_size=3, log=None, **settings) -> StreamLoader:
    return StreamLoader(stream, LoggingCollator(log), batch_size, **settings)


def first_batches(loader, count):
    """The first batches, copied, and what the loader tells after each: its place and its pass."""
    batches, states, passes = [], [json.dumps(loader.state_dict())], [loader.passes]
    for batch in itertools.islice(loader, count):
        batches.append({name: values.clone() for name, values in batch.items()})
        states.append(json.dumps(loader.state_dict()))
        passes.append(loader.passes)
    return batches, states, passes


def real_loader() -> StreamLoader:
    rows = tiny_models.tiny_pairs(20, captions_per_image=2).to_iterable_dataset(num_shards=3)
    _, processor = tiny_models.tiny_clip()
    return StreamLoader(as_pairs(rows), SelectionCollator(processor), 4, num_workers=2, shuffle_buffer=6, seed=1)


def write_rest(state: Path, count: int, out: Path) -> None:
    """Write the batches of `real_loader` that follow a saved place to a file."""
    loader = real_loader()
    loader.load_state_dict(json.loads(state.read_text()))
    torch.save(list(itertools.islice(loader, count)), out)


def one_pass(stream, num_parts, number, seed=None):
    """Captions of one pass over all parts, those of the first part first."""
    captions = []
    for part in range(num_parts):
        pairs = StreamPart(stream, part, num_parts, seed).read(Place())
        pairs = itertools.takewhile(lambda placed: placed[0].pass_number <= number, pairs)
        captions += [pair["caption"] for place, pair in pairs if place.pass_number == number]
    return captions
