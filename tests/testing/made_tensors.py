"""Measures how much memory a computation asks for, whatever the machine."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MadeTensors(TorchDispatchMode):
    """Watches the tensors that operations inside make, in backward passes as well.

    Attributes:
        largest: numbers in the largest of them.
    """

    def __init__(self):
        super().__init__()
        self.largest = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if torch.is_tensor(result):
                storage = result.untyped_storage()
                self._storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes() // result.itemsize)
                self.largest = max(self.largest, result.numel())
        return results

    def alive(self) -> int:
        """How many numbers are still held, by anyone."""
        return sum(numel for storage, numel in self._storages.values() if not storage.expired())
