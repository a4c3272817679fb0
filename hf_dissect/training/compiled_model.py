"""Shapes of the inputs of a compiled model: a graph for each length of captions, and each for batches of any size."""

from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.eval_frame import OptimizedModule

MOST_GRAPHS = 64
"""Graphs of a model after which torch runs it uncompiled, which it does after 8 by itself."""


def mark_shapes(prepared: Any, collator: Any) -> Any:
    """Let a compiled model, if there is one, make few graphs.

    Candidates, kept pairs, the chunks of GradCache and the last batch differ in their number of pairs, which a graph
    therefore does not fix. With a collator that makes few shapes, a graph fixes all other sizes, because it is then
    the faster one; otherwise torch fixes those that have not changed yet.

    Args:
        prepared: Model, wrapped or not, or a tuple of which it is the first part.
        collator: Collator of the batches, such as a `SelectionCollator`.

    Returns:
        What was prepared, with the same model.
    """
    model = prepared[0] if isinstance(prepared, tuple) else prepared
    if not isinstance(model, OptimizedModule):
        return prepared
    has_few_shapes = bool(getattr(collator, "has_few_shapes", False))

    def mark(module: Any, positional: tuple, named: dict[str, Any]) -> None:
        for value in (*positional, *named.values()):
            if isinstance(value, torch.Tensor) and value.dim():
                torch._dynamo.maybe_mark_dynamic(value, 0)
                if has_few_shapes and value.dim() > 1:
                    torch._dynamo.mark_static(value, list(range(1, value.dim())))

    model.register_forward_pre_hook(mark, with_kwargs=True)
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MOST_GRAPHS)
    return prepared
