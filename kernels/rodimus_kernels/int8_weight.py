"""Weights of linear layers in 8 bits, as the operators of one token read them on a CPU."""

from typing import NamedTuple

import torch


class Int8Weight(NamedTuple):
    """A matrix ``values * scale[:, None]``, symmetric, with one scale for each output.

    Attributes:
        values: int8 ``[N, K]``.
        scale: float32 ``[N]``.
    """

    values: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device


def decode_weight(weight: torch.Tensor) -> torch.Tensor | Int8Weight:
    """A parameter of a linear layer as :func:`linear` and :func:`blocks_step` take it.

    torchao's 8-bit weights (``Int8WeightOnlyConfig``, one scale for each output) on a CPU become
    an :class:`Int8Weight` of the same memory; any other weight is returned as it stands, also one
    whose layer does more than multiply by it: activations in 8 bits, smoothing, a zero point.
    """
    values, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    is_matrix = (
        type(weight).__module__.startswith("torchao.")
        and type(values) is torch.Tensor
        and type(scale) is torch.Tensor
        and values.device.type == "cpu"
        and (values.dtype, scale.dtype) == (torch.int8, torch.float32)
        and values.dim() == 2
        and values.is_contiguous()
        and scale.shape == (values.shape[0], 1)
    )
    if not is_matrix or any(
        getattr(weight, name, None) is not None for name in _MORE_THAN_A_MATRIX
    ):
        return weight
    zero = getattr(weight, "zero_point", None)
    return weight if zero is not None and zero.any() else Int8Weight(values, scale.flatten())


# what torchao keeps of layers that do something to their input first
_MORE_THAN_A_MATRIX = (
    "act_quant_kwargs",
    "act_quant_scale",
    "act_quant_zero_point",
    "act_pre_scale",
)
