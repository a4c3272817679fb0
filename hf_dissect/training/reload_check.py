"""Check before training that the files of a model, once loaded again, give the embeddings of the model that trains."""

import inspect
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import AutoModel, PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.data.pairs import PairStream
from hf_dissect.models.adapters import find_adapted, is_adapter, list_unsaved_weights, load_adapter, save_base
from hf_dissect.models.families import bare_model
from hf_dissect.models.feature_encoder import find_feature_size
from hf_dissect.selection.scoring import evaluation_mode
from hf_dissect.training.checkpoints import UNFINISHED_FOLDER
from hf_dissect.training.clamp_logit_scale import ClampLogitScale

logger = logging.getLogger(__name__)

NUM_PAIRS = 4
MOST_PARAMETERS = 1_000_000_000
"""Number of parameters up to which a model is checked; a larger one takes long to write and to load."""
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LARGEST_DIFFERENCE_IN_HALF = 3e-2
_OUTPUTS = ("image_embeds", "text_embeds", "embeds", "logits")  # of a dual encoder, and of a student
_METHODS = ("forward", "get_image_features", "get_text_features")
_CAPTIONS = ("a red circle", "two dogs in the snow", "a street at night", "an old map")
_LIBRARIES = ("transformers", "torch", "peft", "accelerate", "hf_dissect", "timm")


class ReloadCheck(TrainerCallback):
    """Callback that warns before training if the saved model would not be the trained one.

    Args:
        make_inputs: Function from the model to the arguments of its forward pass for a few rows; None without them.
        take_saved: Function from the model of the trainer to the part of it that is saved; None for all of it.
        setting: Key of the recipe that switches the check off.
    """

    def __init__(
        self,
        make_inputs: Callable[[nn.Module], dict[str, torch.Tensor] | None],
        take_saved: Callable[[Any], nn.Module] | None = None,
        setting: str = "model.check_reload",
    ) -> None:
        self._make_inputs = make_inputs
        self._take_saved = take_saved or (lambda model: model)
        self._setting = setting

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Save the model to a temporary folder, load it, compare the embeddings of a few pairs, and warn."""
        if not (getattr(args, "check_reload", True) and state.is_world_process_zero and state.global_step == 0):
            return
        model = self._take_saved(model)
        sharded = AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        size = sum(weight.numel() for weight in model.parameters())
        if sharded or size > MOST_PARAMETERS or getattr(bare_model(model), "is_quantized", False):
            logger.info("Whether the saved model can be loaded again is not checked: it is too large, or in parts.")
            return
        start = time.perf_counter()
        try:
            with _leave_no_trace():
                inputs = _try_to_make(self._make_inputs, model)
                problem = find_reload_problem(model, inputs, Path(args.output_dir or ".") / UNFINISHED_FOLDER)
        except Exception as error:  # the check must not end a run
            logger.info("Whether the saved model can be loaded again could not be checked: %r", error)
            return
        logger.info("Saving and loading the model was checked in %.1f s.", time.perf_counter() - start)
        if problem is not None:
            logger.warning(
                "What is saved will not be what is trained: %s. Training continues, but evaluate, audit, push and "
                "from_pretrained will use the saved model. Repair this before you train, or silence the check with "
                "check_reload=False (%s in a recipe).",
                *(problem, self._setting),
            )


def make_callbacks(collator: Any, dataset: Any) -> list[TrainerCallback]:
    """Return the callbacks of a selection run that look after its model.

    Args:
        collator: Collator of the run.
        dataset: Training pairs.
    """
    return [ClampLogitScale(), ReloadCheck(partial(_make_batch, collator=collator, pairs=dataset))]


def find_reload_problem(model: nn.Module, inputs: dict[str, torch.Tensor] | None, place: Path) -> str | None:
    """Save a model, load it as `AutoModel` and this package do, and compare the two.

    Args:
        model: Model with or without an adapter.
        inputs: Arguments of its forward pass for a few pairs; None to compare the weights only.
        place: Folder for a temporary copy.

    Returns:
        The difference, its cause where that is known, and the way out; None if there is no difference.
    """
    if not isinstance(bare_model(model), PreTrainedModel):
        return (
            f"{type(model).__name__} is not a transformers.PreTrainedModel, so that only its weights are saved; "
            "derive it from PreTrainedModel, and register it with AutoModel.register"
        )
    place.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=place) as folder:
            try:
                _save(model, folder)
            except OSError:
                raise
            except Exception as error:
                return f"the model cannot be saved ({_first_line(error)}); every checkpoint will fail"
            try:
                reloaded = _load(model, folder)
            except Exception as error:
                return f"the saved files cannot be loaded ({_first_line(error)}); {_name_ways_out(model)}"
    finally:
        if not any(place.iterdir()):
            place.rmdir()
    weight = next(bare_model(model).parameters())
    return _compare(model, reloaded.to(weight.device, weight.dtype).eval(), inputs)


def _save(model: Any, folder: str) -> None:
    model.save_pretrained(folder)
    save_base(model, folder)


def _load(model: nn.Module, folder: str) -> Any:
    own_code = type(bare_model(model)).__module__.startswith("transformers_modules.")
    if is_adapter(folder):
        return load_adapter(folder, trust_remote_code=own_code)
    if find_adapted(model) is not None:
        raise ValueError(
            "PEFT saves an adapter with a name of its own to a subfolder; leave adapter_name at its default"
        )
    return AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=own_code)


def _compare(model: nn.Module, reloaded: nn.Module, inputs: dict[str, torch.Tensor] | None) -> str | None:
    causes = _find_other_classes(model, reloaded) + _find_patches(model)
    if lost := list_unsaved_weights(model, reloaded):
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        return f"these weights train and are not saved, or not loaded: {', '.join(lost[:3])}{more}; " + (
            "name their modules in modules_to_save of the adapter, or freeze them (requires_grad_(False))"
            if find_adapted(model) is not None
            else _name_ways_out(model, causes)
        )
    if inputs is not None:
        own, others = _embed(model, inputs), _embed(reloaded, inputs)
        dtype = next(bare_model(model).parameters()).dtype
        differences = {
            name: (own[name] - others[name]).norm(dim=-1).max().item() for name in own.keys() & others.keys()
        }
        name, largest = max(differences.items(), key=lambda item: item[1], default=("", 0.0))
        if not largest <= LARGEST_DIFFERENCE.get(dtype, LARGEST_DIFFERENCE_IN_HALF):
            cosine = 1 - largest**2 / 2
            return (
                f"once loaded, its {name} differ by {largest:.3g} from those of the model to be trained (unit length, "
                f"the worst of {len(own[name])} rows, cosine {cosine:.3g}); {_name_ways_out(model, causes)}"
            )
    patched = [cause for cause in causes if "replaced on the class" in cause]
    return f"{'; '.join(patched)}, which another process does not do; {_name_ways_out(model)}" if patched else None


def _name_ways_out(model: nn.Module, causes: list[str] | None = None) -> str:
    reason = f"cause: {'; '.join(causes[:3])}. " if causes else ""
    adapted = find_adapted(model) is not None
    way_out = (
        "save the base as it is now with save_pretrained, and load it from there before the adapter is added"
        if adapted and not causes
        else "register the class with AutoConfig.register and AutoModel.register under a model_type of its own, or "
        "save the trained model yourself and load it with its own class"
    )
    return reason + way_out


def _find_other_classes(model: nn.Module, reloaded: nn.Module) -> list[str]:
    others = dict(bare_model(reloaded).named_modules())
    causes = []
    for name, module in bare_model(model).named_modules():
        other = others.get(name)
        if other is not None and type(other) is not type(module):
            causes.append(
                f"{name or 'the model'} is a {type(module).__name__} and is loaded as {type(other).__name__}"
            )
    return causes


def _find_patches(model: nn.Module) -> list[str]:
    """Describe the methods that somebody replaced on an object or on a class of transformers."""
    causes: dict[str, None] = {}  # each once, in order
    for name, module in bare_model(model).named_modules():
        for method in _METHODS:
            own = vars(module).get(method)
            if own is not None and not hasattr(module, "_hf_hook"):
                causes[f"{method} of {name or 'the model'} is replaced on the object"] = None
            function = getattr(type(module), method, None)
            home, place = type(module).__module__.partition(".")[0], getattr(function, "__module__", None) or ""
            if home == "transformers" and place.partition(".")[0] not in _LIBRARIES and inspect.isfunction(function):
                causes[f"{method} of {type(module).__name__} is replaced on the class"] = None
    return list(causes)


# ---- a batch and its embeddings ----


def _try_to_make(
    make_inputs: Callable[[nn.Module], dict[str, torch.Tensor] | None], model: nn.Module
) -> dict[str, torch.Tensor] | None:
    try:
        inputs = make_inputs(model)
    except Exception as error:
        logger.info("The outputs of the saved model are not compared, because no batch could be made: %r", error)
        return None
    device = next(bare_model(model).parameters()).device
    return (
        None if inputs is None else {name: each.to(device) for name, each in inputs.items() if torch.is_tensor(each)}
    )


def _make_batch(model: nn.Module, collator: Any, pairs: Any) -> dict[str, torch.Tensor] | None:
    """Collate a few pairs: the first ones of a table, or made ones in place of a stream, which is not read ahead."""
    if pairs is None:
        return None
    if isinstance(pairs, PairStream) or not hasattr(pairs, "__len__"):
        rows = _make_rows(model)
    else:
        rows = [pairs[row] for row in range(min(NUM_PAIRS, len(pairs)))]
    return forward_inputs(model, collator(rows))


def _make_rows(model: nn.Module) -> list[dict[str, Any]]:
    from PIL import Image

    sizes = {tower: find_feature_size(model, tower) for tower in ("vision", "text")}
    generator, captions = np.random.default_rng(0), _CAPTIONS
    vectors = {
        tower: list(generator.normal(size=(NUM_PAIRS, size)).astype(np.float32))
        for tower, size in sizes.items()
        if size is not None
    }
    images: list[Any] = vectors.get("vision") or [
        Image.fromarray(part) for part in generator.integers(0, 256, (NUM_PAIRS, 64, 64, 3), dtype=np.uint8)
    ]
    rows: list[dict[str, Any]] = [
        {"image": image, "caption": caption, "sample_id": row, "task_id": 0}
        for row, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]
    for row, vector in zip(rows, vectors.get("text", []), strict=False):
        row["text_features"] = vector
    return rows


@torch.no_grad()
def _embed(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute outputs of the forward pass, and of the two methods of a dual encoder that embed one side alone."""
    embeds = {}
    with evaluation_mode(model), _without_autocast(model):
        outputs = model(**inputs)
        inputs = {name: value for name, value in inputs.items() if name != "task_ids"}
        for name in _OUTPUTS:
            if torch.is_tensor(value := getattr(outputs, name, None)):
                embeds[name] = F.normalize(value.double(), dim=-1)
        for method in _METHODS[1:]:
            encode = getattr(bare_model(model), method, None)
            if encode is None:
                continue
            of_images = "image" in method
            value = encode(**{name: value for name, value in inputs.items() if _is_of_images(name) == of_images})
            value = value if torch.is_tensor(value) else getattr(value, "pooler_output", None)
            if torch.is_tensor(value):
                embeds[f"embeddings by {method}"] = F.normalize(value.double(), dim=-1)
    return embeds


def _is_of_images(name: str) -> bool:
    return name.startswith("pixel") or name == "spatial_shapes"


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """Call the forward pass that accelerate wraps in mixed precision."""
    original = vars(model).get("_original_forward")
    wrapped = vars(model).get("forward")
    if original is None or wrapped is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


@contextmanager
def _leave_no_trace() -> Iterator[None]:
    """Restore all random states, and keep transformers and PEFT silent."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=devices))
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
