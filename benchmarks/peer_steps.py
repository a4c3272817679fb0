"""Training steps of hf_dissect and of its peers on the same pairs, each in a thread that waits for its turn.

Every arm trains by the loop of its own package. A turn is one optimiser step with all that comes with it: reading and
collating the batch, forward and backward pass, clipping, the optimiser, and what the loop does between two steps.
"""

import contextlib
import ctypes
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import torchvision_operators  # noqa: F401  # before transformers, which imports torchvision
from transformers import CLIPConfig, CLIPModel, Trainer, TrainerCallback, TrainingArguments

from hf_dissect import DissectTrainer, DissectTrainingArguments, load_model_and_processor

SIZES: dict[str, dict[str, int]] = {
    # Vision: side, patch, width, layers. Text: width, layers, tokens, vocabulary. Embeddings: dim.
    "tiny": {"side": 16, "patch": 8, "width": 32, "layers": 1, "text_width": 32, "text_layers": 1},
    "small": {"side": 64, "patch": 8, "width": 256, "layers": 4, "text_width": 256, "text_layers": 4},
    "ViT-B/32": {"side": 224, "patch": 32, "width": 768, "layers": 12, "text_width": 512, "text_layers": 12},
    "ViT-B/16": {"side": 224, "patch": 16, "width": 768, "layers": 12, "text_width": 512, "text_layers": 12},
}
SIZES["tiny"] |= {"tokens": 8, "vocabulary": 600, "dim": 16, "head": 16}
SIZES["small"] |= {"tokens": 32, "vocabulary": 4096, "dim": 256, "head": 64}
for _name in ("ViT-B/32", "ViT-B/16"):
    SIZES[_name] |= {"tokens": 77, "vocabulary": 49408, "dim": 512, "head": 64}

LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.1, 1.0
ARMS = (
    "hf_dissect, plain",
    "hf_dissect, selected",
    "transformers Trainer",
    "open_clip",
    "sentence-transformers",
)
OWN = ("hf_dissect, plain", "hf_dissect, selected")
PACKAGES = {"open_clip": "open_clip_torch", "sentence-transformers": "sentence-transformers"}


class NotInstalled(Exception):
    """Error for a peer whose package is missing; the message says how to install it."""


def import_peer(module: str, package: str) -> Any:
    """Import a module of a peer.

    Raises:
        NotInstalled: It cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise NotInstalled(f"not installed: pip install {package} ({error})") from error


def list_versions(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages by name, "not installed" for others."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def make_config(size: str) -> dict[str, Any]:
    """Return the configuration of the CLIP of transformers, with the activation of open_clip's default."""
    sizes = SIZES[size]
    towers = {
        "vision_config": {"image_size": sizes["side"], "patch_size": sizes["patch"], "hidden_size": sizes["width"]},
        "text_config": {
            "hidden_size": sizes["text_width"],
            "max_position_embeddings": sizes["tokens"],
            "vocab_size": sizes["vocabulary"],
            "eos_token_id": sizes["vocabulary"] - 1,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
    }
    for prefix, tower in (("", towers["vision_config"]), ("text_", towers["text_config"])):
        width = sizes[f"{prefix}width"]
        tower |= {"num_hidden_layers": sizes[f"{prefix}layers"], "intermediate_size": 4 * width, "hidden_act": "gelu"}
        tower |= {"num_attention_heads": width // sizes["head"]}
    return {"projection_dim": sizes["dim"], **towers}


def make_model(size: str) -> CLIPModel:
    """Build the CLIP of transformers with fixed random weights."""
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(**make_config(size)))


class Pairs:
    """Decoded pictures and tokens in the memory of the device, which every arm collates in the same way.

    Args:
        size: Name of the size of the model.
        count: Number of pairs.
        device: Device whose memory holds them.
    """

    def __init__(self, size: str, count: int, device: str = "cpu") -> None:
        sizes, generator = SIZES[size], torch.Generator().manual_seed(0)
        shape = (count, 3, sizes["side"], sizes["side"])
        self.pixels = torch.rand(shape, generator=generator).mul_(2).sub_(1).to(device)
        self.tokens = torch.randint(2, sizes["vocabulary"] - 1, (count, sizes["tokens"]), generator=generator)
        self.tokens[:, -1] = sizes["vocabulary"] - 1  # the end, which both libraries take the embedding from
        self.tokens = self.tokens.to(device)
        self.rows = datasets.Dataset.from_dict(
            {
                "image": [f"{row}.png" for row in range(count)],
                "caption": [f"picture {row}" for row in range(count)],
                "number": list(range(count)),
            }
        )

    def stack(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Collate pictures and tokens of some pairs."""
        rows = torch.tensor(numbers, device=self.pixels.device)
        return self.pixels[rows], self.tokens[rows]


class Turns:
    """One arm of the comparison: a loop in a thread that stops after each step until it is its turn again.

    Args:
        run: Function that trains, and calls the function that it gets after each step.
        threads: Number of threads of torch.
        device: Type of the device.
    """

    def __init__(self, run: Callable[[Callable[[], None]], None], threads: int, device: str) -> None:
        self._run, self._threads, self._device = run, threads, device
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def step(self) -> tuple[float, float]:
        """Let the arm make its next step, and return its seconds of the wall clock and of the processor."""
        start = time.perf_counter(), time.process_time()
        if not self._thread.is_alive() and not self._ended:
            self._thread.start()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return time.perf_counter() - start[0], time.process_time() - start[1]

    def close(self) -> None:
        """End the loop, and wait for it."""
        if self._thread.is_alive():
            self._closed = True
            self._go.release()
            self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        self._go.acquire()
        try:
            self._run(self._pause)
        except _Closed:
            pass
        except BaseException as error:  # reported by the thread that waits
            self._error = error
        self._ended = True
        self._done.release()

    def _pause(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._done.release()
        self._go.acquire()
        if self._closed:
            raise _Closed


class _Closed(Exception):
    """End of an arm that is not needed any more."""


class _PauseAfterStep(TrainerCallback):
    def __init__(self, pause: Callable[[], None]) -> None:
        self._pause = pause

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the next turn."""
        self._pause()


def trainer_settings(batch: int, steps: int, device: str) -> dict[str, Any]:
    """Return the training arguments of the arms that use the Trainer of transformers."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP_NORM,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,  # the pairs are where they are needed
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_arm(name: str, size: str, pairs: Pairs, batch: int, steps: int, device: str, threads: int) -> Turns:
    """Build an arm.

    Args:
        name: One of `ARMS`.
        size: One of `SIZES`.
        pairs: Training pairs.
        batch: Number of pairs, or of candidates, in a step.
        steps: Number of steps.
        device: "cpu" or "cuda".
        threads: Number of threads of torch.

    Raises:
        NotInstalled: The package of a peer is missing.
    """
    prepare = {
        "hf_dissect, plain": prepare_own,
        "hf_dissect, selected": _prepare_selected,
        "transformers Trainer": _prepare_trainer,
        "open_clip": _prepare_open_clip,
        "sentence-transformers": _prepare_sentence_transformers,
    }[name]
    return Turns(prepare(size, pairs, batch, steps, device), threads, device)


class OwnCollator:
    """Collator of pairs in memory for hf_dissect."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        numbers = [row["sample_id"] for row in rows]
        pixels, tokens = self._pairs.stack(numbers)
        return {"pixel_values": pixels, "input_ids": tokens, "sample_id": torch.tensor(numbers)}


def prepare_own(size: str, pairs: Pairs, batch: int, steps: int, device: str, **settings: Any) -> Callable:
    """Prepare `DissectTrainer` with further settings; by default it trains on all candidates."""
    more = settings or {"selection_strategy": "none"}
    model = make_model(size)

    def run(pause: Callable[[], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = trainer_settings(batch, steps, device) | {"save_run_folder": False, "check_reload": False}
            trainer = DissectTrainer(
                model=model,
                args=DissectTrainingArguments(folder, **(settings | more)),
                data_collator=OwnCollator(pairs),
                train_dataset=pairs.rows.select_columns(["image", "caption"]),
                callbacks=[_PauseAfterStep(pause)],
            )
            trainer.train()

    return run


def _prepare_selected(*arguments: Any) -> Callable:
    options = {"variant": "momentum"}
    return prepare_own(*arguments, selection_strategy="dissect", selection_ratio=0.5, selection_options=options)


def _prepare_trainer(size: str, pairs: Pairs, batch: int, steps: int, device: str) -> Callable:
    model = make_model(size)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        pixels, tokens = pairs.stack([row["number"] for row in rows])
        return {"pixel_values": pixels, "input_ids": tokens, "return_loss": True}

    def run(pause: Callable[[], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = trainer_settings(batch, steps, device)
            Trainer(
                model=model,
                args=TrainingArguments(folder, remove_unused_columns=False, **settings),
                data_collator=collate,
                train_dataset=pairs.rows,
                callbacks=[_PauseAfterStep(pause)],
            ).train()

    return run


def _prepare_open_clip(size: str, pairs: Pairs, batch: int, steps: int, device: str) -> Callable:
    """Prepare `open_clip_train.train.train_one_epoch`, over a loader of the same pairs in place of its own data."""
    package = PACKAGES["open_clip"]
    open_clip, train = import_peer("open_clip", package), import_peer("open_clip_train.train", package)
    scheduler = import_peer("open_clip_train.scheduler", package)
    sizes = SIZES[size]
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=sizes["dim"],
        vision_cfg={
            "image_size": sizes["side"],
            "patch_size": sizes["patch"],
            "width": sizes["width"],
            "layers": sizes["layers"],
            "head_width": sizes["head"],
        },
        text_cfg={
            "context_length": sizes["tokens"],
            "vocab_size": sizes["vocabulary"],
            "width": sizes["text_width"],
            "heads": sizes["text_width"] // sizes["head"],
            "layers": sizes["text_layers"],
        },
        output_dict=True,
    )
    args = SimpleNamespace(
        device=device,
        precision="amp_bf16" if device == "cuda" else "fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=False,
        horovod=False,
        grad_clip_norm=CLIP_NORM,
        rank=0,
        local_rank=0,
        world_size=1,
        log_local=False,
        log_every_n_steps=500,  # that of the Trainer
        batch_size=batch,
        wandb=False,
    )

    def run(pause: Callable[[], None]) -> None:
        model.to(device)
        excluded = [p for n, p in model.named_parameters() if _has_no_decay(n, p)]  # as open_clip_train.main has it
        others = [p for n, p in model.named_parameters() if not _has_no_decay(n, p)]
        groups = [{"params": excluded, "weight_decay": 0.0}, {"params": others, "weight_decay": WEIGHT_DECAY}]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)
        data = {"train": SimpleNamespace(dataloader=_PausingLoader(pairs, batch, steps, pause), set_epoch=_ignore)}
        schedule = scheduler.const_lr(optimizer, LEARNING_RATE, 0, steps)
        train.train_one_epoch(model, data, open_clip.ClipLoss(), 0, optimizer, None, schedule, None, args)

    run.model = model  # type: ignore[attr-defined]
    return run


def _has_no_decay(name: str, weight: torch.Tensor) -> bool:
    return weight.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def _ignore(epoch: int) -> None:
    """Take the number of an epoch."""


class _PausingLoader:
    """Loader of pictures and tokens that waits for its turn when it is asked for the batch after a step."""

    def __init__(self, pairs: Pairs, batch: int, steps: int, pause: Callable[[], None]) -> None:
        self._pause, self._steps = pause, steps
        self.num_batches, self.num_samples = 10**6 * steps, 10**6 * steps * batch  # no last batch, which is logged
        self._loader = torch.utils.data.DataLoader(
            pairs.rows,
            batch_size=batch,
            shuffle=True,
            drop_last=True,
            collate_fn=lambda rows: pairs.stack([row["number"] for row in rows]),
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        made = 0
        while True:
            for batch in self._loader:
                if made:
                    self._pause()
                if made == self._steps:
                    return
                made += 1
                yield batch


def _prepare_sentence_transformers(size: str, pairs: Pairs, batch: int, steps: int, device: str) -> Callable:
    """Prepare the trainer with MultipleNegativesRankingLoss in both directions over its module of the same CLIP."""
    package = PACKAGES["sentence-transformers"]
    library = import_peer("sentence_transformers", package)
    losses = import_peer("sentence_transformers.sentence_transformer.losses", package)
    modules = import_peer("sentence_transformers.base.modules", package)
    words = [f"word{number}" for number in range(50)]
    with tempfile.TemporaryDirectory() as folder:
        vision = make_config("tiny")["vision_config"] | {"image_size": SIZES[size]["side"]}
        config = {"model_type": "clip", "vision_config": vision, "text_config": {"max_position_embeddings": 32}}
        _, processor = load_model_and_processor(config=config, captions=words, vocab_size=600)  # which is not used
        processor.save_pretrained(folder)
        make_model(size).save_pretrained(folder)
        module = modules.Transformer(folder)
    model = library.SentenceTransformer(modules=[module], device=device)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        pixels, tokens = pairs.stack([row["number"] for row in rows])
        return {
            "caption_input_ids": tokens,
            "caption_modality": "text",
            "image_pixel_values": pixels,
            "image_modality": "image",
        }

    collate.valid_label_columns = []  # type: ignore[attr-defined]  # which the trainer asks its collator for

    def run(pause: Callable[[], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = trainer_settings(batch, steps, device) | {"remove_unused_columns": False}
            directions = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
            library.SentenceTransformerTrainer(
                model=model,
                args=library.SentenceTransformerTrainingArguments(folder, **settings),
                data_collator=collate,
                train_dataset=pairs.rows,
                loss=losses.MultipleNegativesRankingLoss(model, **directions),
                callbacks=[_PauseAfterStep(pause)],
            ).train()

    run.model = model  # type: ignore[attr-defined]
    return run


def share_one_arena() -> None:
    """Let all threads allocate from one arena of glibc, which keeps what it has; by default, threads differ."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for option, value in ((_ARENA_MAX, 1), (_TRIM_THRESHOLD, 2**30), (_MMAP_THRESHOLD, 2**25)):
            library.mallopt(option, value)


_ARENA_MAX, _TRIM_THRESHOLD, _MMAP_THRESHOLD = -8, -1, -3  # of malloc.h


def silence_loggers() -> None:
    """Keep the packages from writing to the terminal between the figures."""
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
