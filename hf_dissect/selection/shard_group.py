"""Exchange between the processes that hold the shards of a ledger: packets of one size, over few connections."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

_PADDING = -1  # no id is negative
UNUSABLE = 2**30
"""Stands for the fullest packet of a rank with negative ids, of which an error will speak."""
FEWEST_OF_GRID = 16
"""Smallest number of processes that exchange in two stages."""


def find_homes(sample_id: torch.Tensor, count: int) -> torch.Tensor:
    """Return the rank that holds each pair, int64 `(B,)`, the same whoever asks.

    The bits are mixed as in SplitMix64, unlike those of `IdIndex`, so that the ids of a rank spread over its index.

    Args:
        sample_id: Ids of the pairs, int64 `(B,)`.
        count: Number of ranks.
    """
    mixed = sample_id
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (mixed ^ ((mixed >> 31) & ((1 << 33) - 1))).bitwise_and(2**62 - 1) % count


class Route:
    """Way of some pairs to the ranks that hold them, in packets of as many places for each rank.

    Args:
        sample_id: Ids of the pairs, int64 `(B,)`.
        count: Number of ranks.
    """

    def __init__(self, sample_id: torch.Tensor, count: int) -> None:
        self.sample_id = sample_id
        homes = find_homes(sample_id, count)
        self._order = torch.argsort(homes, stable=True)
        self._homes = homes[self._order]
        numbers = torch.bincount(homes, minlength=count)
        self._within = torch.arange(len(homes)) - (numbers.cumsum(0) - numbers)[self._homes]
        is_usable = not len(sample_id) or int(sample_id.min()) >= 0
        self.fullest = int(numbers.max()) if is_usable else UNUSABLE

    def pack(self, rows: torch.Tensor, split: int, count: int) -> torch.Tensor:
        """Return the packets `(count, split, W)` of rows uint8 `(B, W)` that begin with their ids."""
        empty = torch.full((split, 1), _PADDING, dtype=torch.int64).view(torch.uint8)
        packets = torch.zeros(count, split, rows.shape[1], dtype=torch.uint8)
        packets[:, :, : empty.shape[1]] = empty
        packets.view(count * split, -1)[self._places(split)] = rows[self._order]
        return packets

    def unpack(self, replies: torch.Tensor, split: int) -> torch.Tensor:
        """Return the replies `(B, C)` for the pairs from those in the places of packets, `(count, split, C)`."""
        unsorted = torch.empty(len(self._order), replies.shape[2], dtype=replies.dtype)
        unsorted[self._order] = replies.reshape(-1, replies.shape[2])[self._places(split)]
        return unsorted

    def _places(self, split: int) -> torch.Tensor:
        return self._homes * split + self._within


class ShardGroup:
    """Group of all processes for exchanges on the CPU, apart from those of the training.

    From `FEWEST_OF_GRID` processes on, packets travel in stages, as along the axes of a grid: of 1,024 processes, each
    sends to 5 times 3 others instead of 1,023, and 5 times as many bytes, which are few. What arrives is the same.
    Every rank makes its group and calls its methods in the same order.

    Args:
        count: Number of ranks.
        own: Rank of this process.
        fewest_of_grid: Smallest number of processes that exchange in stages.
    """

    def __init__(self, count: int, own: int, fewest_of_grid: int = FEWEST_OF_GRID) -> None:
        self.count, self.own = count, own
        self.shape = plan_stages(count, fewest_of_grid)
        grid = torch.arange(count).view(self.shape)
        self._axes = []
        for axis, size in enumerate(self.shape):
            lines = grid.movedim(axis, -1).reshape(-1, size)
            (line,) = lines[(lines == own).any(1)].tolist()
            self._axes.append(dist.new_group(line, backend="gloo", use_local_synchronization=True))

    def exchange(self, packets: torch.Tensor) -> torch.Tensor:
        """Send a packet to each rank, and return the packets from each, both `(count, ...)` of the same shape."""
        on_grid = packets.view(*self.shape, *packets.shape[1:])
        for axis, group in enumerate(self._axes):
            on_grid = _all_to_all(on_grid.movedim(axis, 0), group).movedim(0, axis)
        return on_grid.reshape(packets.shape)

    def find_largest(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the largest of the numbers `(n,)` of all ranks, one by one."""
        largest = numbers.clone()
        for group in self._axes:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        return largest

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values `(n, ...)` of all ranks, `(count, n, ...)`, of the same shape on each."""
        gathered = values.contiguous()[None]
        for group in reversed(self._axes):
            parts = [torch.empty_like(gathered) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, gathered, group=group)
            gathered = torch.cat(parts)
        return gathered

    def gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return the rows `(n, ...)` of all ranks in the order of the ranks, of which each may have another number."""
        sizes = self.gather(torch.tensor([len(values)])).flatten().tolist()
        padded = values.new_zeros(max(1, *sizes), *values.shape[1:])
        padded[: len(values)] = values
        return torch.cat([part[:size] for part, size in zip(self.gather(padded), sizes, strict=True)])

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sums `(m,)` over all ranks, added in the order of the ranks."""
        return self.gather(sums).sum(0)

    def agree_on_split(self, route: Route) -> int:
        """Return the number of places of a packet: the largest number of pairs that a rank sends to another.

        Raises:
            ValueError: An id of some rank is negative.
        """
        smallest = int(route.sample_id.min()) if len(route.sample_id) else 0
        fullest, below = self.find_largest(torch.tensor([route.fullest, -min(0, smallest + 1)])).tolist()
        if below or smallest < 0:
            wrong = smallest if smallest < 0 else -below - 1
            raise ValueError(f"sample_id {wrong} is negative; ids are non-negative integers.")
        return fullest

    def ask(self, route: Route, split: int, answer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Ask the homes of pairs for values, and answer the questions of the other ranks.

        Args:
            route: Way of `B` pairs.
            split: Number of places of a packet, above 0.
            answer: Function from ids int64 `(n,)` to values float32 `(n, C)`.

        Returns:
            Values of the pairs, float32 `(B, C)`.
        """
        questions = self.exchange(route.pack(as_bytes([route.sample_id]), split, self.count))
        asked = questions.view(torch.int64).view(self.count * split)
        is_real = asked != _PADDING
        answers = answer(asked[is_real])
        replies = torch.full((self.count * split, answers.shape[1]), torch.nan)
        replies[is_real] = answers
        return route.unpack(self.exchange(replies.view(self.count, split, -1)), split)

    def send(self, route: Route, split: int, columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Send columns `(B,)` of pairs to their homes, and return those that arrived, in the order of their senders.

        Args:
            route: Way of `B` pairs.
            split: Number of places of a packet, above 0.
            columns: Columns by name, the same names and types on every rank.

        Returns:
            Columns by name and `sample_id`, `(n,)` each.
        """
        columns = {"sample_id": route.sample_id, **columns}
        arrived = self.exchange(route.pack(as_bytes(list(columns.values())), split, self.count))
        rows = arrived.view(self.count * split, -1)
        parts = rows.split([column.element_size() for column in columns.values()], dim=1)
        received = {
            name: part.contiguous().view(column.dtype).flatten()
            for (name, column), part in zip(columns.items(), parts, strict=True)
        }
        is_real = received["sample_id"] != _PADDING
        return {name: column[is_real] for name, column in received.items()}


def as_bytes(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return columns `(n,)` of any types side by side, uint8 `(n, bytes of a row)`."""
    return torch.cat(
        [column.contiguous().view(torch.uint8).view(len(column), column.element_size()) for column in columns], dim=1
    )


def plan_stages(count: int, fewest_of_grid: int = FEWEST_OF_GRID) -> list[int]:
    """Return the numbers of processes that exchange with each other in each stage, whose product is `count`.

    A stage costs a processor more the more others there are, and something for itself; stages of 4 cost least in all.

    Args:
        count: Number of ranks.
        fewest_of_grid: Smallest number of ranks that exchange in stages.
    """
    if count < fewest_of_grid:
        return [count]
    stages, left = [], count
    for factor in (4, 2, *range(3, count + 1, 2)):
        while left % factor == 0:
            stages.append(factor)
            left //= factor
    return stages


def _all_to_all(packets: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    sent = packets.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
