"""States of checkpoints are read back as they were, and a later form is refused before anything is trained."""

import json

import pytest
import torch
from transformers import TrainingArguments

from hf_dissect.distributed import Ranks
from hf_dissect.training.run_state import STATE_FILE, Part, read_state, restore_state, save_state


class Counter:
    """Holds plain data and tensors, nested."""

    def __init__(self):
        self.state = {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of one part for all ranks and one for each."""
    parts = {"shared": Part(Counter()), "own": Part(Counter(), each_rank=True)}
    parts["shared"].stateful.state = {"steps": 3, "nested": {"sums": torch.arange(4)}, "names": ["a", "b"]}
    parts["own"].stateful.state = {"rows": 7}
    save_state(tmp_path, parts, TrainingArguments(str(tmp_path), use_cpu=True), Ranks())
    return tmp_path


def test_parts_are_restored(saved):
    parts = {"shared": Part(Counter()), "own": Part(Counter(), each_rank=True)}
    restore_state(read_state(saved), parts, Ranks())
    shared = parts["shared"].stateful.state
    assert torch.equal(shared["nested"]["sums"], torch.arange(4)) and shared["steps"] == 3
    assert shared["names"] == ["a", "b"] and parts["own"].stateful.state == {"rows": 7}


def test_a_later_form_is_refused(saved):
    content = json.loads((saved / STATE_FILE).read_text())
    (saved / STATE_FILE).write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(ValueError, match="form 99.*resume with the version"):
        read_state(saved)
