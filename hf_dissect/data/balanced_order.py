"""Order of the pairs of an epoch in which some come more than once, and others wait for a later epoch."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from hf_dissect.data.cluster_balance import Balance
from hf_dissect.data.pair_columns import key_hash


class BalancedSampler(Sampler[int]):
    """Sampler of epochs of `len(codes)` visits, the same on every rank and after a resume.

    It is systematic. The pairs of a group lie on a wheel in random order, and each epoch continues where the last one
    ended, so that after any number `E` of epochs a pair was visited `E * visits` times, rounded down or up. The number
    of visits of a group in `E` epochs differs from its expectation by less than 1, too, and those of all groups
    together always fill the epoch: they are the differences of cumulative sums that are rounded down.

    A batch of candidates holds no pair twice: copies of a pair are dealt to different batches.

    Args:
        balance: Groups of pairs and their visits.
        batch_size: Number of candidates of all ranks in a batch.
        seed: Seed of the orders.
    """

    def __init__(self, balance: Balance, batch_size: int, seed: int) -> None:
        generator = np.random.default_rng(key_hash(f"balance/{seed}"))
        self._num_pairs = len(balance.codes)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0
        wheel = generator.permutation(self._num_pairs)
        wheel = wheel[balance.codes[wheel] >= 0]
        self._wheel = wheel[np.argsort(balance.codes[wheel], kind="stable")]
        self._sizes = np.bincount(balance.codes[wheel], minlength=len(balance.visits))
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._ends = np.cumsum(self._sizes * balance.visits)
        self._ends[-1] = self._num_pairs
        self._offset = generator.uniform(0.25, 0.75)  # whole numbers of visits stay far from being rounded

    def __len__(self) -> int:
        return self._num_pairs

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng(key_hash(f"balance/{self._seed}/{self._epoch}"))
        yield from deal_to_batches(self.list_visits(), self._batch_size, generator).tolist()

    def list_visits(self) -> np.ndarray:
        """Return the positions of the pairs that are visited in the epoch, int64 `(pairs,)`, group by group."""
        before, after = self._count_visits(self._epoch), self._count_visits(self._epoch + 1)
        counts = after - before
        firsts = np.cumsum(counts) - counts
        group = np.repeat(np.arange(len(counts)), counts)
        turn = np.arange(self._num_pairs) - firsts[group] + before[group]
        return self._wheel[self._starts[group] + turn % self._sizes[group]]

    def _count_visits(self, epochs: int) -> np.ndarray:
        """Return the visits of each group before an epoch, int64 `(groups,)`."""
        ends = np.floor(epochs * self._ends + self._offset).astype(np.int64)
        return np.diff(ends, prepend=0)


def deal_to_batches(visits: np.ndarray, batch_size: int, generator: np.random.Generator) -> np.ndarray:
    """Shuffle the visits of an epoch so that no batch holds a pair twice.

    Pairs in random order, copies next to each other, are dealt to the batches in turn, and the batches are shuffled.
    Copies of a pair lie in different batches if there are no more of them than full batches.

    Args:
        visits: Positions of pairs, int64 `(n,)`, with repetitions.
        batch_size: Number of pairs in a batch.
        generator: Source of the random numbers.

    Returns:
        The same positions, batch by batch, the last one of which may be short.
    """
    num_full, rest = divmod(len(visits), batch_size)
    rank = generator.permutation(int(visits.max(initial=0)) + 1)
    visits = visits[np.argsort(rank[visits], kind="stable")]
    if not num_full:
        return visits
    places = np.arange(len(visits))
    in_all = rest * (num_full + 1)  # as many as fill the short batch
    batch = np.where(places < in_all, places % (num_full + 1), (places - in_all) % num_full)
    order = generator.permutation(num_full)
    if rest:
        # Processes fill a short batch with pairs of the first one, which then should not hold the same pairs.
        shared = np.unique(batch[np.isin(visits, visits[batch == num_full])])
        free = np.setdiff1d(order, shared)
        if len(free):
            place = int(np.flatnonzero(order == generator.choice(free))[0])
            order[[0, place]] = order[[place, 0]]
        order = np.append(order, num_full)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return visits[np.argsort(position[batch], kind="stable")]
