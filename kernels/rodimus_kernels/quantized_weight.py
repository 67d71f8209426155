"""Weights of linear layers in 8 and 4 bits, as the decode operators read them on a CPU."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

# as kInt4Group and kInt4Unit in csrc/arguments.h: weights per scale, and weights packed together
_GROUP, _UNIT = 32, 128
# Candidates for the size of a group's largest weight in steps of the scale: which of them gives the
# least error differs by group.
_LARGEST = (8.5, 8.0, 7.5, 7.0)
# Rows that are rounded at a time, to keep intermediate tensors small.
_ROWS_AT_ONCE = 64


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


class Int4Weight(NamedTuple):
    """A matrix of integers from -8 to 7; every 32 neighbours in a row share a scale.

    Attributes:
        values: uint8 ``[N, 64 U]`` with ``U = ceil(K / 128)``: a row is U units of 32 words of 16
            bits, little-endian; bits 4 j to 4 j + 3 of word i are weight ``32 j + i`` of the unit,
            in two's complement. Weights past K are zeros.
        scale: bfloat16 ``[N, 4 U]``.
        inputs: K.
    """

    values: torch.Tensor
    scale: torch.Tensor
    inputs: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.values.shape[0], self.inputs))

    dtype, device = Int8Weight.dtype, Int8Weight.device


QuantizedWeight = Int8Weight | Int4Weight
QUANTIZED = (Int8Weight, Int4Weight)


def int4_units(inputs: int) -> int:
    """Number of units in a row of an :class:`Int4Weight`."""
    return -(-inputs // _UNIT)


def quantize_int4(weight: torch.Tensor) -> Int4Weight:
    """Round a matrix ``[N, K]`` to 4 bits per weight, 4.5 with the scales.

    Four scales put the largest weight of a group of 32 in a row near the end of the range; each
    group takes the one with the least sum of squared errors. A group of zeros stays zeros.

    Raises:
        ValueError: weight is not a floating-point matrix, or holds an infinity or NaN.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            "weight must be a matrix [N, K] of floating point, got shape"
            f" {tuple(weight.shape)} of {weight.dtype}"
        )
    if not weight.isfinite().all():
        raise ValueError("weight must be finite to be rounded to 4 bits")
    parts = [_round_rows(rows) for rows in weight.detach().split(_ROWS_AT_ONCE)]
    values, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return Int4Weight(values, scale, weight.shape[1])


def _round_rows(weight):
    """Packed values and scales of a few rows."""
    padded = F.pad(weight.float(), (0, -weight.shape[1] % _UNIT))
    groups = padded.unflatten(1, (-1, _GROUP))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    # the scale gets the opposite sign, because the range has one more step below zero
    largest = torch.where(high > -low, high, low)
    least, best = None, None
    for steps in _LARGEST:
        scale = (largest / -steps).bfloat16().float()
        rounded = _integers(groups, scale)
        error = torch.addcmul(groups, rounded, scale, value=-1).square_().sum(2, keepdim=True)
        if least is None:
            least, best = error, scale
        else:
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return _pack(_integers(groups, best).to(torch.int16)), best[..., 0].bfloat16()


def _integers(groups, scale):
    """Multiples of the scale nearest to the weights, as float32."""
    return (groups * torch.where(scale == 0, 0.0, 1 / scale)).round_().clamp_(-8, 7)


def _pack(values):
    """Pack int16 ``[N, 4 U, 32]`` into uint8 ``[N, 64 U]``."""
    places = values.unflatten(1, (-1, 4)).unbind(2)
    words = places[3] << 12
    for j in range(3):
        words |= (places[j] & 15) << 4 * j
    return words.flatten(1).view(torch.uint8)


def decode_weight(weight: torch.Tensor) -> torch.Tensor | QuantizedWeight:
    """A parameter of a linear layer as :func:`linear` and :func:`blocks_step` take it.

    torchao's 8-bit weights (``Int8WeightOnlyConfig``, one scale for each output) on a CPU become
    an :class:`Int8Weight` of the same memory, and for a tensor with the attribute ``int4_weight``
    on a CPU that attribute is returned. Any other weight is returned unchanged, also one whose
    layer does more than multiply by it: 8-bit activations, smoothing, a zero point.
    """
    # the fast path: each token looks up every matrix, and lookups of absent attributes are slow
    if type(weight) in (torch.Tensor, torch.nn.Parameter):
        return weight
    values, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    packed = getattr(weight, "int4_weight", None)
    if type(packed) is Int4Weight and packed.device.type == "cpu":
        return packed
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


# attributes that torchao sets for layers that change their input before the product
_MORE_THAN_A_MATRIX = (
    "act_quant_kwargs",
    "act_quant_scale",
    "act_quant_zero_point",
    "act_pre_scale",
)
