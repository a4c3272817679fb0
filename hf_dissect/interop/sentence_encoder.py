"""Module of sentence-transformers for runs that it cannot load by itself; only that library imports this file."""

import inspect
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from sentence_transformers.base.modules import Transformer

from hf_dissect.data.tasks import read_task_names
from hf_dissect.models.families import bare_model, list_networks
from hf_dissect.models.loading import load_model_and_processor
from hf_dissect.models.merging import fix_task

__all__ = ["SentenceEncoder"]


class SentenceEncoder(Transformer):
    """Dual encoder of a run: with a MoLA adapter, of two towers, of twins, or with its own base next to the adapter.

    `SentenceTransformer(run, trust_remote_code=True)` loads it, and `model_kwargs={"task": "birds"}` chooses the task
    of an adapter with an expert for each.
    """

    def _load_config(self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        if backend != "torch":
            raise ValueError(f"backend={backend!r}: a run of hf_dissect is loaded with backend='torch' only")
        self._folder = model_name_or_path
        if not Path(model_name_or_path).is_dir():
            given = {name: config_kwargs.get(name) for name in ("revision", "token", "cache_dir", "local_files_only")}
            place = {name: value for name, value in given.items() if value is not None}
            self._folder = snapshot_download(model_name_or_path, **place)
        self._loaded, _ = load_model_and_processor(name_or_path=self._folder)
        bare: Any = bare_model(self._loaded)
        return bare.config, False

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: Any,
        backend: str,
        is_peft_model: bool,
        **given: Any,
    ) -> Any:
        model: Any = self._modules.pop("_loaded")  # it becomes `self.model`
        fix_task(model, given.get("task"), read_task_names(self._folder))
        # Those of twins take any argument, of which only the ones of the networks are meant.
        for name in ("get_text_features", "get_image_features"):
            method = getattr(list_networks(model)[0], name)
            self._method_signature_cache[name] = set(inspect.signature(method).parameters)
        return model.requires_grad_(False).eval()

    def get_embedding_dimension(self) -> int:
        """Return the number of dimensions of an embedding."""
        config = self.config
        networks = len(getattr(self.model, "networks", (None,)))
        size = getattr(config, "projection_dim", None) or getattr(config.get_text_config(), "projection_size", None)
        size = size or getattr(getattr(config, "first_config", None), "projection_dim", None)
        return int(size or config.get_text_config().hidden_size) * networks
