"""Drop the experts of each token that are not worth their work; `moqc.quant.routing` is the reference.

The device code is in ``routing.cu``; a pair that is dropped gets the id -1, which the experts' kernels read
nothing for.
"""

from __future__ import annotations

from tvm import tirx

from moqc.errors import UserError
from moqc.schedules.cuda.emit import kernel
from moqc.schedules.pruning import PruneShape

MOST_PAIRS = 32
"""Experts a token; a lane keeps one."""
WARPS = 4
"""Tokens a block."""


def prune_function(shape: PruneShape) -> tirx.PrimFunc:
    """Build the kernel.

    Parameters of the PrimFunc: x float32 [T, H], ids [T, k] of type `shape.ids`, weights float32 [T, k],
    positions int64 [T], strength float32 [E], limits float32 [3] (limit, peak, margin), with `shape.slopes`
    slopes float16 [E, H], and the outputs ids and weights. Raises UserError for more than `MOST_PAIRS`
    experts a token.
    """
    count = shape.top_k
    if count > MOST_PAIRS:
        raise UserError(f"{count} experts a token: the CUDA kernel prunes up to {MOST_PAIRS}")
    with kernel("prune_routing", rule=shape.rule, experts=shape.experts, top_k=count) as k:
        tokens, size = tirx.Var("t", "int64"), [shape.experts, shape.hidden]
        arguments = [
            k.parameter("x", [tokens, shape.hidden], "float32"),
            k.parameter("ids", [tokens, count], shape.ids),
            k.parameter("weights", [tokens, count], "float32"),
            k.parameter("positions", [tokens], "int64"),
            k.parameter("strength", [shape.experts], "float32"),
            k.parameter("limits", [3], "float32"),
            *([k.parameter("slopes", size, "float16")] if shape.slopes else []),
            k.parameter("kept_ids", [tokens, count], shape.ids),
            k.parameter("kept_weights", [tokens, count], "float32"),
        ]
        flags = ", ".join(str(flag).lower() for flag in (shape.rule == "mass", shape.renormalize))
        function = f"moqc::prune<{shape.experts}, {count}, {shape.hidden}, {flags}>"
        facts = [tirx.const(shape.exponent, "float32"), tirx.const(shape.first, "int64")]
        blocks = (tokens + (WARPS - 1)) // WARPS
        k.launch(blocks, 32 * WARPS, 0, function, tirx.Cast("int32", tokens), *facts, *arguments)
    return k.finish()
