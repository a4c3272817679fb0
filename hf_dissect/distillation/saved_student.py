"""Tells whether a saved model is the student of a distillation, and where its files are."""

from pathlib import Path

from transformers import PreTrainedConfig

from hf_dissect.distillation.student import StudentConfig
from hf_dissect.hub.address import HubAddress, is_hub_address

STUDENT_FOLDER = "student"
"""Where, in a checkpoint of all networks, the student lies alone."""


def student_folder(checkpoint: str | Path) -> Path | None:
    """The folder of the student that a run folder or a checkpoint on this machine holds; None where there is none."""
    for folder in (Path(checkpoint), Path(checkpoint) / STUDENT_FOLDER):
        if (folder / "config.json").is_file():
            return folder if _model_type(folder) == StudentConfig.model_type else None
    return None


def is_student(checkpoint: str | Path) -> bool:
    """Whether a run folder, a checkpoint, an id of the Hub or `hub:USER/REPO` holds the student of a distillation.

    What cannot be read holds none; whoever loads the model then tells why.
    """
    if Path(checkpoint).exists():
        return student_folder(checkpoint) is not None
    address = HubAddress.parse(checkpoint) if is_hub_address(checkpoint) else HubAddress(str(checkpoint))
    return _model_type(address.repo_id, address.revision) == StudentConfig.model_type


def _model_type(place: str | Path, revision: str | None = None) -> str | None:
    try:
        return PreTrainedConfig.get_config_dict(str(place), revision=revision)[0].get("model_type")
    except (OSError, ValueError):
        return None
