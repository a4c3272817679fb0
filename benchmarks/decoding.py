"""Pictures per second and core that JPEG decoders make ready for a model, and how far their pixels are from Pillow's.

    python benchmarks/decoding.py [--data /data/flickr8k/train.parquet] [--rounds 5]
                                  [--output benchmarks/results/decoding.json]

Each picture is decoded to RGB and resized to 224 x 224. Made pictures (smooth ones and noise) come in several sizes;
`--data` adds a sample of the photographs in the column `image` of a Parquet file. Decoders that are not installed are
left out. They take turns within a round, in one thread, by processor time. `collator` is the whole path of this
package, with checks, ids, captions, resizing and normalising.
"""

import argparse
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, features
from results_file import show_and_write
from transformers import CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_dissect.data.images import decode_image
from hf_dissect.data_collator import SelectionCollator

SIDE = 224
SIZES = [(320, 240), (500, 375), (1024, 768), (2048, 1536)]
Decode = Callable[[bytes], Image.Image]


def make_jpeg(size: tuple[int, int], kind: str, seed: int) -> bytes:
    """Return a JPEG of noise, or of smooth colours with some noise, as the pixels of a photograph are."""
    generator = np.random.default_rng(seed)
    if kind == "noise":
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    else:
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (smooth + generator.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def read_photographs(path: Path, number: int) -> list[bytes]:
    """Return the files of photographs, at equal distances in the column `image` of a Parquet file."""
    import pyarrow.parquet as pq

    column = pq.read_table(path, columns=["image"]).column("image")
    rows = np.linspace(0, len(column) - 1, number).astype(int)
    return [column[int(row)].as_py()["bytes"] for row in rows]


def with_pillow(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def with_draft(factor: int) -> Decode:
    """Return a decoder that lets the JPEG library halve the picture while it stays `factor` times the result."""

    def decode(content: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(content))
        image.draft(None, (factor * SIDE, factor * SIDE))
        return image.convert("RGB")

    return decode


def list_decoders() -> dict[str, Decode]:
    """Return the decoders that are installed, by name."""
    decoders: dict[str, Decode] = {
        "Pillow": with_pillow,
        "decode_image": decode_image,
        "decode_image, fast": lambda content: decode_image(content, smallest_side=2 * SIDE),
        "Pillow, draft 1x": with_draft(1),
        "Pillow, draft 2x": with_draft(2),
    }
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        decoders["simplejpeg"] = lambda content: Image.fromarray(simplejpeg.decode_jpeg(content))
        decoders["simplejpeg, draft 2x"] = lambda content: Image.fromarray(
            simplejpeg.decode_jpeg(content, min_height=2 * SIDE, min_width=2 * SIDE, min_factor=1)
        )
    if importlib.util.find_spec("torchcodec"):
        try:
            from torchcodec.decoders import decode_jpeg
        except (ImportError, RuntimeError, OSError) as error:  # its libraries, or those of FFmpeg, are missing
            print(f"torchcodec left out: {str(error).strip().splitlines()[0]}")
        else:
            decoders["torchcodec"] = lambda content: Image.fromarray(
                decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)).permute(1, 2, 0).numpy()
            )
    return decoders


def resize(image: Image.Image) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def make_collators() -> dict[str, Callable[[list[bytes]], object]]:
    """Return the whole path of this package, by name."""
    tokens = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    tokenizer = CLIPTokenizer(vocab=tokens, merges=[], model_max_length=77)
    collators = {}
    for name, settings in {"collator": {}, "collator, fast": {"fast_decoding": True}}.items():
        parts = type("Processor", (), {"tokenizer": tokenizer, "image_processor": CLIPImageProcessorPil()})()
        collate = SelectionCollator(parts, **settings)
        collators[name] = lambda files, collate=collate: collate(
            [{"image": {"bytes": file}, "caption": "a", "sample_id": row} for row, file in enumerate(files)]
        )
    return collators


def measure(files: list[bytes], decoders: dict[str, Decode], rounds: int) -> dict[str, dict]:
    """Return pictures per second of processor time, and the differences of the pixels, by decoder."""
    expected = np.stack([np.asarray(resize(with_pillow(file)), dtype=np.int16) for file in files])
    whole, seconds, pixels = make_collators(), {}, {}
    calls = {name: lambda decode=decode: [resize(decode(file)) for file in files] for name, decode in decoders.items()}
    calls |= {name: lambda collate=collate: collate(files) for name, collate in whole.items()}
    for number in range(rounds + 1):
        for name in [*calls][number % len(calls) :] + [*calls][: number % len(calls)]:
            start = time.process_time()
            made = calls[name]()
            seconds.setdefault(name, []).append(time.process_time() - start)
            pixels[name] = made
    results = {}
    for name, values in seconds.items():
        rates = [len(files) / value for value in values[1:]]
        ratios = [plain / own for own, plain in zip(values[1:], seconds["Pillow"][1:], strict=True)]
        results[name] = {
            "pictures_per_second_median": round(statistics.median(rates), 1),
            "ratio_to_pillow_median": round(statistics.median(ratios), 3),
            "ratio_to_pillow_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
        if name in decoders:
            found = np.stack([np.asarray(image, dtype=np.int16) for image in pixels[name]])
            difference = np.abs(found - expected)
            results[name] |= {"mean_difference": round(float(difference.mean()), 3), "largest": int(difference.max())}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--largest", type=int, default=2048, help="widest of the made pictures")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    decoders = list_decoders()
    results: dict[str, object] = {
        "pictures": options.pictures,
        "rounds": options.rounds,
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
    }
    for kind in ("smooth", "noise"):
        for size in SIZES:
            if size[0] <= options.largest:
                files = [make_jpeg(size, kind, seed) for seed in range(options.pictures)]
                results[f"{kind} {size[0]} x {size[1]}"] = measure(files, decoders, options.rounds)
    if options.data is not None:
        photographs = read_photographs(options.data, options.pictures)
        results["photographs"] = measure(photographs, decoders, options.rounds)
    show_and_write(results, options.output)


if __name__ == "__main__":
    main()
