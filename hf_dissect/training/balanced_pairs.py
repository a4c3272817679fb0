"""Balance of the training pairs over clusters: weights are found or read, checked, and written to the run folder."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_dissect.data.balanced_order import BalancedSampler
from hf_dissect.data.cluster_balance import Balance, find_power_weights, make_balance, read_clusters
from hf_dissect.data.pairs import PairDataset, PairStream
from hf_dissect.data.sampling_file import SAMPLING_FILE, SamplingWeights, write_sampling_file
from hf_dissect.data.streaming.stream_balance import StreamBalance
from hf_dissect.hub.pull import read_shared_weights

logger = logging.getLogger(__name__)


def balance_pairs(pairs: Any, args: Any) -> None:
    """Give training pairs the balance that the arguments describe, if they describe one.

    Args:
        pairs: Training pairs, or None.
        args: Arguments of the run.

    Raises:
        FileNotFoundError: There is no sampling file.
        HubError: The Hub does not have it, or cannot be reached.
        ValueError: The pairs do not know the column or their ids, or the file belongs to other data.
    """
    column, file = args.balance_column, args.sampling_file
    if pairs is None or (column is None and file is None):
        return
    _check_column(pairs, column, "balance_column" if column is not None else "sampling_file", column or file)
    weights = None
    if file is not None:
        with args.main_process_first(local=True, desc="reading the sampling file"):
            weights = read_shared_weights(str(file))
        _check_keys(pairs, weights, column)
    if isinstance(pairs, PairDataset):
        pairs.balance = _balance_table(pairs, args, weights)
        _report(pairs.balance, args, len(pairs))
    elif weights is None:
        raise ValueError(
            f"balance_column={column!r}: a stream does not know the sizes of its clusters beforehand; pass "
            "sampling_file, which hf_dissect.data.sampling_file.write_cluster_weights writes, or data that are not "
            "streamed."
        )
    else:
        pairs.balance = StreamBalance(weights, column, args.balance_max_visits, _choose_seed(args))


def choose_sampler(pairs: Any, args: Any, usual: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the function from training pairs to their sampler, that of the balance if there is one.

    Args:
        pairs: Training pairs with a length.
        args: Arguments of the run.
        usual: Function of the Trainer.
    """
    balance = getattr(pairs, "balance", None)
    if balance is None:
        return usual
    return lambda dataset: BalancedSampler(balance, args.train_batch_size * args.world_size, _choose_seed(args))


def write_weights(pairs: Any, args: Any) -> None:
    """Write the sampling file of balanced stored pairs to the run folder, once."""
    if isinstance(pairs, PairDataset) and pairs.balance is not None and args.should_save:
        write_sampling_file(Path(args.output_dir) / SAMPLING_FILE, pairs.balance, pairs.sample_ids)


def _choose_seed(args: Any) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def _check_column(pairs: Any, column: str | None, argument: str, value: str) -> None:
    if not isinstance(pairs, PairDataset | PairStream):
        raise ValueError(
            f"{argument}={value!r} would not be read: {type(pairs).__name__} makes its pairs itself. Pass a table or "
            f"a datasets.IterableDataset, or leave {argument} out and balance the pairs there."
        )
    if pairs.columns.balance != column:
        raise ValueError(
            f"balance_column={column!r}: train_dataset was wrapped without it; pass balance={column!r} to as_pairs, "
            "or the table itself to the trainer."
        )


def _check_keys(pairs: Any, weights: SamplingWeights, column: str | None) -> None:
    """Check that a sampling file has what its weights are looked up by."""
    if column is not None and weights.clusters is None:
        raise ValueError(
            f"data.sampling_file {weights.name!r} has ids and no clusters; leave data.balance_column out to look up "
            "the weights by id."
        )
    if column is not None:
        return
    if weights.ids is None:
        raise ValueError(
            f"data.sampling_file {weights.name!r} has clusters and no ids; name the column of the clusters with "
            "data.balance_column."
        )
    if isinstance(pairs, PairStream) and (weights.num_samples is not None or pairs.columns.sample_id is None):
        raise ValueError(
            f"data.sampling_file {weights.name!r}: a stream knows its pairs by keys alone; set data.id_column here "
            "and in the run that writes the file, or name the clusters with data.balance_column."
        )
    if isinstance(pairs, PairDataset) and pairs.num_samples != weights.num_samples and weights.num_samples is not None:
        raise ValueError(
            f"data.sampling_file {weights.name!r} is of {weights.num_samples} pairs by row number, and the training "
            f"data are {len(pairs)}{'' if pairs.sample_ids is None else ' by keys (data.id_column)'}: other data, "
            "another split, or another setting of rows or ids."
        )


def _balance_table(pairs: PairDataset, args: Any, weights: SamplingWeights | None) -> Balance:
    # Fewer visits than batches, so that no batch has to hold a pair twice.
    num_batches = len(pairs) // (args.train_batch_size * args.world_size)
    most = max(1, min(args.balance_max_visits, num_batches - 1))
    if most < args.balance_max_visits:
        logger.warning(
            "balance_max_visits: an epoch has %d batches, so that a pair is visited at most %d times.",
            *(num_batches, most),
        )
    name = args.balance_column
    if name is None:
        assert weights is not None
        ids = np.arange(len(pairs)) if pairs.sample_ids is None else np.asarray(pairs.sample_ids)
        found = weights.look_up(ids)
        _report_lacking(weights, np.isnan(found), "pairs")
        return make_balance(np.zeros(0), np.nan_to_num(found, nan=1.0), most, by_pair=True)
    names, code_of_row = read_clusters(pairs.rows, name)
    codes = code_of_row[pairs.row_of_pair]
    sizes = np.bincount(codes, minlength=len(names))
    if weights is None:
        of_clusters = find_power_weights(np.maximum(sizes, 1), args.balance_strength)
    else:
        of_clusters = np.array([(weights.clusters or {}).get(cluster, np.nan) for cluster in names])
        _report_lacking(weights, np.isnan(of_clusters)[codes], "pairs")
        of_clusters = np.nan_to_num(of_clusters, nan=1.0)
    if names and names[-1] is None:
        logger.warning(
            "balance_column %s: %d of %d pairs have no value; together they are one cluster.",
            *(name, sizes[-1], len(codes)),
        )
    return make_balance(codes, of_clusters, most, names)


def _report_lacking(weights: SamplingWeights, is_lacking: np.ndarray, what: str) -> None:
    if is_lacking.all():
        raise ValueError(
            f"data.sampling_file {weights.name!r} knows none of the {len(is_lacking)} training {what}: it belongs to "
            "other data, or data.balance_column or data.id_column names another column than in the run that wrote it."
        )
    if is_lacking.any():
        logger.warning(
            "data.sampling_file %s lacks %d of the %d training %s, which have the weight 1.",
            *(weights.name, is_lacking.sum(), len(is_lacking), what),
        )


def _report(balance: Balance, args: Any, num_pairs: int) -> None:
    if not args.should_log:
        return
    if balance.cluster_codes is None:
        shown = f"{len(balance.visits)} groups of weights"
    else:
        sizes = np.bincount(balance.cluster_codes, minlength=len(balance.clusters))
        largest = int(sizes.argmax())
        share = balance.visits_of_pairs[balance.cluster_codes == largest].sum() / num_pairs
        shown = f"{len(sizes)} clusters, the largest of {sizes[largest] / num_pairs:.1%} of the pairs and {share:.1%} "
        shown += "of the visits"
    logger.info(
        "The pairs are balanced over %s; a pair is visited %.2f to %.2f times in an epoch.",
        *(shown, balance.visits.min(), balance.visits.max()),
    )
    if np.allclose(balance.visits, 1) and not (balance.codes < 0).any():
        logger.warning("The balance changes nothing: every pair is visited once in an epoch.")
