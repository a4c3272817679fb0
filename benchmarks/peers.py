"""hf_dissect next to its peers in one run: a training step of the same CLIP, and the loading of the same tar shards.

    python benchmarks/peers.py [--parts steps,loaders] [--threads 1] [--output benchmarks/results/peers.json]
    python benchmarks/peers.py --parts loaders --shards 'shards/train-{000..003}.tar'

steps: DissectTrainer on all candidates (`strategy none`) and with selection at r = 0.5, the plain Trainer of
transformers with the loss of its CLIP, `open_clip_train.train.train_one_epoch` over open_clip's CLIP of the same
sizes, and the trainer of sentence-transformers with MultipleNegativesRankingLoss in both directions. All get the
same decoded pictures and tokens from memory and collate them, clip gradients to norm 1 and use the AdamW that they
come with. They take turns, step by step, and the order changes each round.

loaders: reading, decoding, resizing to 224 px, tokenising with the same tokenizer and batching, by `data.streaming` of
hf_dissect, by webdataset's WebLoader and by open_clip's `get_wds_dataset`, with the peers' own transforms.

Ratios are taken within a round. The processor time is that of this process and its workers, which is what a
machine that others use as well leaves comparable. A peer that is not installed is a line that says how to install
it: pip install open_clip_torch sentence-transformers webdataset torchvision.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import peer_loaders
import peer_steps
import torch
from peer_steps import NotInstalled
from results_file import show_and_write

from hf_dissect import load_model_and_processor
from hf_dissect.data.shards.files import expand_braces

CLOCKS = ("wall", "processor")
LISTED = ("torch", "transformers", "accelerate", "open_clip_torch", "sentence-transformers", "webdataset")
LISTED += ("torchvision", "pillow", "datasets")
Measured = dict[str, list[tuple[float, float]]]


def open_all(names: tuple[str, ...], make: Callable[[str], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what `make` makes of each name, and the reasons of those whose package is missing."""
    made, missing = {}, {}
    for name in names:
        try:
            made[name] = make(name)
        except NotInstalled as error:
            missing[name] = str(error)
            print(f"{name:24} {error}", flush=True)
    return made, missing


def take_turns(steps: dict[str, Callable[[], tuple[float, float]]], rounds: int, warm_up: int) -> Measured:
    """Return wall and processor seconds of each step by arm; each round has an order of its own."""
    names, measured, random = list(steps), {name: [] for name in steps}, Random(0)
    for number in range(warm_up + rounds):
        for name in random.sample(names, len(names)):
            seconds = steps[name]()
            if number >= warm_up:
                measured[name].append(seconds)
    return measured


def compare(measured: Measured, plain: str, own: tuple[str, ...]) -> dict[str, Any]:
    """Return the median of each arm, and its ratio to one arm of ours, by clock, round for round.

    The last figures are those of that arm against the peer with the smallest median.
    """
    figures: dict[str, Any] = {name: {} for name in measured}
    for place, clock in enumerate(CLOCKS):
        seconds = {name: [pair[place] for pair in pairs] for name, pairs in measured.items()}
        for name, values in seconds.items():
            ratios = [own_step / other for own_step, other in zip(seconds[plain], values, strict=True)]
            figures[name][clock] = {
                "ms_median": statistics.median(values) * 1000,
                "ours_over_this_median": statistics.median(ratios),
                "ours_over_this_quartiles": list(_quartiles(ratios)),
            }
        peers = [name for name in measured if name not in own]
        if peers:
            fastest = min(peers, key=lambda name: figures[name][clock]["ms_median"])
            ratio = figures[fastest][clock]["ours_over_this_median"]
            figures.setdefault("fastest peer", {})[clock] = {"name": fastest, "ours_over_it_median": ratio}
    return figures


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4)
    return first, third


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the training steps."""
    peer_steps.share_one_arena()
    pairs = peer_steps.Pairs(options.size, options.batch * 8, options.device)
    total = options.warm_up + options.rounds
    given = (options.size, pairs, options.batch, total, options.device, options.threads)
    names = tuple(name for name in peer_steps.ARMS if name in options.arms.split(";"))
    arms, missing = open_all(names, lambda name: peer_steps.make_arm(name, *given))
    try:
        measured = take_turns({name: arm.step for name, arm in arms.items()}, options.rounds, options.warm_up)
    finally:
        for arm in arms.values():
            arm.close()
    figures = compare(measured, peer_steps.OWN[0], peer_steps.OWN)
    settings = {"size": options.size, "batch": options.batch, "rounds": options.rounds, "device": options.device}
    settings["model"] = peer_steps.SIZES[options.size]
    for name, values in figures.items():
        if name in measured:
            print(f"{name:24} " + ", ".join(f"{clock} {values[clock]['ms_median']:.1f} ms" for clock in CLOCKS))
    _show_fastest(figures)
    return settings | {"arms": figures, "not measured": missing}


def measure_loaders(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the loaders, with each number of workers."""
    paths = options.shards or peer_loaders.write_shards(folder, options.num_shards, options.pictures)
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {
        "model_type": "clip",
        "vision_config": {**tower, "image_size": peer_loaders.SIDE, "patch_size": 32},
        "text_config": {**tower, "max_position_embeddings": peer_loaders.TOKENS},
    }
    captions = peer_loaders.list_captions(paths)
    _, processor = load_model_and_processor(config=config, captions=captions, vocab_size=600)  # not the model
    results: dict[str, Any] = {"batch": options.loader_batch, "batches": options.loader_batches}
    results |= {"rounds": options.loader_rounds, "buffer": options.buffer, "shards": len(paths)}
    results["bytes_per_shard"] = round(statistics.mean(path.stat().st_size for path in paths))
    for workers in options.workers:
        given = (paths, processor, options.loader_batch, workers, options.buffer)
        loaders, missing = open_all(peer_loaders.LOADERS, lambda name, given=given: _Reader(name, given))
        steps = {name: lambda reader=reader: reader.read(options.loader_batches) for name, reader in loaders.items()}
        measured = take_turns(steps, options.loader_rounds, 1)
        for reader in loaders.values():
            reader.close()
        figures = compare(measured, "hf_dissect", ("hf_dissect",))
        count = options.loader_batch * options.loader_batches
        for name, values in measured.items():
            rates = {clock: count / statistics.median(pair[place] for pair in values) for place, clock in _PLACES}
            figures[name] |= {
                "pictures_per_second": rates["wall"],
                "pictures_per_processor_second": rates["processor"],
            }
            print(f"{workers} workers  {name:14} {rates['wall']:.0f} a second, {rates['processor']:.0f} a core")
        _show_fastest(figures)
        results[f"{workers} workers"] = {"loaders": figures, "not measured": missing}
    return results


_PLACES = tuple(enumerate(CLOCKS))


class _Reader:
    """An open loader, of which some batches can be read at a time.

    With workers, only one loader is open at a time, since they would read ahead in each other's turn.
    """

    def __init__(self, name: str, given: tuple[Any, ...]) -> None:
        self._make, self._workers = lambda: peer_loaders.open_loader(name, *given), given[3]
        self._batches: Iterator | None = self._make()
        if self._workers:
            self._batches = None

    def read(self, count: int) -> tuple[float, float]:
        """Read some batches, and return the seconds of wall clock and processors."""
        batches = self._make() if self._batches is None else self._batches
        if self._workers:  # until the workers have filled their buffers
            for _ in range(4 * self._workers):
                next(batches)
        watch = peer_loaders.Stopwatch()
        for _ in range(count):
            pixels, tokens = next(batches)
            if tuple(pixels.shape[1:]) != (3, peer_loaders.SIDE, peer_loaders.SIDE) or len(pixels) != len(tokens):
                raise RuntimeError(f"a loader made a batch of pixels {tuple(pixels.shape)}")
        return watch.read()

    def close(self) -> None:
        """Close the loader."""
        self._batches = None


def _show_fastest(figures: dict[str, Any]) -> None:
    for clock, found in figures.get("fastest peer", {}).items():
        print(f"ours / {found['name']} ({clock}): {found['ours_over_it_median']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="steps,loaders")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(peer_steps.SIZES), help="small on the CPU, ViT-B/32 on CUDA")
    parser.add_argument("--batch", type=int, help="pairs in a step: 16 on the CPU, 1024 on CUDA")
    parser.add_argument("--arms", default=";".join(peer_steps.ARMS), help="names, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--shards", help="own tar shards (.jpg, .txt), as a path with {000..003}")
    parser.add_argument("--num-shards", type=int, default=4, help="of those that are drawn")
    parser.add_argument("--pictures", type=int, default=500, help="pictures in each of them, of 256 px")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--loader-batch", type=int, default=64)
    parser.add_argument("--loader-batches", type=int, default=8, help="batches in a turn")
    parser.add_argument("--loader-rounds", type=int, default=10)
    parser.add_argument("--buffer", type=int, default=256, help="pairs that are shuffled")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - {"steps", "loaders"}:
        parser.error(f"--parts {', '.join(sorted(unknown))}: choose of steps, loaders")
    if unknown := set(options.arms.split(";")) - set(peer_steps.ARMS):
        parser.error(f"--arms {', '.join(sorted(unknown))}: choose of {', '.join(peer_steps.ARMS)}")
    if peer_steps.OWN[0] not in options.arms:
        parser.error(f"--arms: {peer_steps.OWN[0]!r} must be one of them, which the others are compared with")
    if min(options.rounds, options.loader_rounds, options.loader_batches) < 1:
        parser.error("--rounds, --loader-rounds and --loader-batches: at least 1")
    if options.shards:
        options.shards = [Path(name).absolute() for name in expand_braces(options.shards)]
        if absent := [path.name for path in options.shards if not path.is_file()]:
            parser.error(f"--shards: no file {', '.join(absent)}")
        if len({path.parent for path in options.shards}) > 1:
            parser.error("--shards: they must lie in one folder")
    options.size = options.size or ("ViT-B/32" if options.device == "cuda" else "small")
    options.batch = options.batch or (1024 if options.device == "cuda" else 16)
    torch.set_num_threads(options.threads)
    peer_steps.silence_loggers()

    results: dict[str, Any] = {"threads": options.threads, "versions": peer_steps.list_versions(*LISTED)}
    print(", ".join(f"{name} {version}" for name, version in results["versions"].items()), flush=True)
    if "steps" in parts:
        results["steps"] = measure_steps(options)
    if "loaders" in parts:
        with tempfile.TemporaryDirectory() as folder:
            results["loaders"] = measure_loaders(options, Path(folder))
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
