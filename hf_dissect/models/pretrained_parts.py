"""Loading the parts of a dual encoder that others have trained, and one message for all the ways that can fail."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError, SafetensorError)


def load_tokenizer(name_or_path: str, argument: str, trust_remote_code: bool = False, **place: Any) -> Any:
    """Load a tokenizer.

    Args:
        name_or_path: Hub id or local folder.
        argument: Name of the setting, for errors.
        trust_remote_code: True to allow code from the repository to run.
        **place: Keywords of `from_pretrained`, such as `subfolder`.

    Raises:
        ValueError: If there is no such tokenizer, or it does not fit the installed transformers.
        OSError: If its files cannot be read or downloaded.
    """
    part = "" if argument == "tokenizer" else "the tokenizer of "
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **place)
    except LOADING_ERRORS as error:
        raise loading_error(argument, name_or_path, error, part) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"{argument} {name_or_path!r} has a {type(tokenizer).__name__} in place of a tokenizer")
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        # transformers makes a tokenizer that knows no word where the files of the vocabulary are missing.
        reason = FileNotFoundError("there is no vocabulary, such as tokenizer.json or vocab.txt")
        raise loading_error(argument, name_or_path, reason, part)
    return tokenizer


def load_image_processor(name_or_path: str, argument: str, trust_remote_code: bool = False) -> Any:
    """Load an image processor; arguments and errors are those of `load_tokenizer`."""
    try:
        return AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise loading_error(argument, name_or_path, error, "the image processor of ") from error


def find_file(name_or_path: str, file: str) -> str | None:
    """Return the path of a file in a folder or, downloaded, in a repository; None if there is no such file."""
    try:
        return cached_file(
            name_or_path,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):  # neither a folder nor a repository, as the model's own loading reports
        return None


def loading_error(argument: str, value: str, error: Exception, part: str = "") -> OSError | ValueError:
    """Build the error for a model, or a part of one, that cannot be loaded, with the way out.

    Args:
        argument: Name of the setting.
        value: Hub id or local folder.
        error: Error of transformers.
        part: Words before the name of the setting, such as `"the tokenizer of "`.
    """
    kind = ValueError if isinstance(error, ValueError | KeyError | TypeError | ImportError) else OSError
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if Path(value).exists():
        way_out = "check that save_pretrained wrote the folder completely and that it fits the installed transformers"
    elif constants.is_offline_mode():
        kind = OSError
        way_out = "no such local folder exists, and HF_HUB_OFFLINE switches the Hub off; give a folder, or unset it"
    else:
        way_out = (
            "no such local folder exists, and the Hub did not provide it; check the spelling and the network, and log "
            "in (hf auth login) if the model is gated"
        )
    return kind(f"{part}{argument} {value!r} could not be loaded: {way_out} ({reason})")
