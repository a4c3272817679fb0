"""Recognition of the student of a distillation among saved models, and the place of its files."""

from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig

from hf_dissect.distillation.student import StudentConfig
from hf_dissect.hub.address import HubAddress, is_hub_address
from hf_dissect.hub.reachability import HubNeed, check_reachable, is_on_hub
from hf_dissect.training.run_state import STATE_FILE

STUDENT_FOLDER = "student"
"""Folder, in a checkpoint of all networks, of the student alone."""


def find_student_folder(checkpoint: str | Path) -> Path | None:
    """Return the folder of the student in a run folder or a checkpoint of this machine, or None if there is none."""
    for folder in (Path(checkpoint), Path(checkpoint) / STUDENT_FOLDER):
        if (folder / "config.json").is_file():
            return folder if _read_model_type(folder) == StudentConfig.model_type else None
    return None


def is_student(checkpoint: str | Path) -> bool:
    """Check that a run folder, a checkpoint, a Hub id or `hub:USER/REPO` holds the student of a distillation.

    The answer is False for a model that cannot be read; whoever loads the model then reports why.

    Raises:
        HubUnreachable: The model is on the Hub, which does not answer.
    """
    if Path(checkpoint).exists():
        return find_student_folder(checkpoint) is not None
    address = parse_address(checkpoint)
    check_reachable([HubNeed("model", address.repo_id)] if is_on_hub(address.repo_id) else [])
    return _read_model_type(address.repo_id, address.revision) == StudentConfig.model_type


def parse_address(checkpoint: str | Path) -> HubAddress:
    """Return the address on the Hub that a Hub id or `hub:USER/REPO` names."""
    name = str(checkpoint)
    return HubAddress.parse(name) if is_hub_address(name) else HubAddress(name)


def _read_model_type(place: str | Path, revision: str | None = None) -> str | None:
    try:
        return PreTrainedConfig.get_config_dict(str(place), revision=revision)[0].get("model_type")
    except (OSError, ValueError):
        return None


def check_networks(folder: str, model: nn.Module) -> None:
    """Check that a checkpoint holds the networks of a run.

    Args:
        folder: Folder of the checkpoint.
        model: Networks of the run.

    Raises:
        ValueError: Files are missing, or the checkpoint holds other networks.
    """
    path = Path(folder, "model.safetensors")
    if missing := [name for name in (path.name, STATE_FILE) if not Path(folder, name).is_file()]:
        raise ValueError(
            f"{folder} is not a whole checkpoint of a distillation: it has no {' and no '.join(missing)}; resume "
            "from another checkpoint."
        )
    with safe_open(path, "pt") as saved:
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if differing := sorted(name for name in {*shapes, *own} if shapes.get(name) != own.get(name)):
        raise ValueError(
            f"{folder} is a checkpoint of other networks ({', '.join(differing[:3])} differ); resume with the "
            "settings of that run, or start again in another output_dir."
        )
