"""The gated activation between an MLP's two projections.

Rounded as in transformers' LlamaMLP, `act_fn(gate) * up`: silu is rounded to the model dtype, then the product.

Shape legend: N rows, I intermediate width; 2I is the gate's columns and then the up projection's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import silu

from batchgen_kernels.dispatch import with_kernel

if TYPE_CHECKING:
    import torch


@with_kernel("triton_swiglu")
def swiglu(gate_up_N2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [N, I] in the dtype of the contiguous `gate_up_N2I`."""
    gate, up = gate_up_N2I.chunk(2, -1)
    return silu(gate) * up
