"""The files of a dual encoder next to its weights that loading needs: here, with its tasks, and in other libraries."""

from pathlib import Path
from typing import Any

from torch import nn

from hf_dissect.data.tasks import save_task_names
from hf_dissect.interop.sentence_files import write_sentence_files
from hf_dissect.models.adapters import save_base


def write_loading_files(folder: Path, model: nn.Module, processor: Any, pairs: Any, *, is_sharded: bool) -> None:
    """Write the base of an adapter, the names of the tasks, and the files of sentence-transformers.

    Args:
        folder: Folder of the weights.
        model: Dual encoder, wrapped or not.
        processor: Its processor.
        pairs: Training pairs, whose tasks may have names.
        is_sharded: True if each process holds a part of the model only, so that a base cannot be written.
    """
    if not is_sharded:
        save_base(model, folder)
    write_sentence_files(folder, model, processor)
    save_task_names(pairs, folder)
