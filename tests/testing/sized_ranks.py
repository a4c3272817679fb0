"""Called by test_resolution.py in two processes: notes the size of the pictures of each step."""

import json
from pathlib import Path

from hf_dissect import DissectTrainer
from testing.faulty_run import make_trainer


class NotingTrainer(DissectTrainer):
    """Notes the size of the pictures of each step."""

    def training_step(self, model, inputs, *arguments, **keywords):
        size = inputs["pixel_values"].shape[-1]
        self.__dict__.setdefault("sizes", []).append([self.state.global_step, size])
        return super().training_step(model, inputs, *arguments, **keywords)


def train_by_sizes(folder: Path) -> None:
    """Train on stored pairs and on a stream, and write the sizes by step."""
    found = {}
    for kind in ("map", "stream"):
        settings = {"image_size": {0: 16, 0.5: 32}, "patch_dropout": 0.5, "max_steps": 6, "dataloader_num_workers": 1}
        trainer = make_trainer(folder / kind, NotingTrainer, stream=kind == "stream", **settings)
        trainer.train()
        found[kind] = trainer.sizes
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps(found))
