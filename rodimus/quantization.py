"""Weights of linear layers in 8 or 4 bits, for models that decode on a CPU.

Needs torchao, whose tensor classes hold the weights: its own for 8 bits; for 4 bits a subclass of
ours, in the format that ``rodimus_kernels`` reads.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel

from rodimus_kernels import Int4Weight, linear, quantize_int4, reference

# Gates are small and decide what a state keeps and for how long; a narrow gate has rows of only 16
# or 32 inputs. The head gets 8 bits too, because the scores of all tokens are compared.
_IN_8_BITS = ("ch_gate_proj", "mem_gate_proj")


class Int4Tensor(TorchAOBaseTensor):
    """A parameter ``[N, K]`` that holds the numbers of an :class:`rodimus_kernels.Int4Weight`.

    A linear layer with it computes no gradient of the weight; the gradient of its input is exact.
    """

    tensor_data_names = ["values", "scale"]
    tensor_attribute_names = ["inputs", "dtype"]

    def __new__(cls, values, scale, inputs, dtype):
        shape = (values.shape[0], inputs)
        return cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=values.device)

    def __init__(self, values, scale, inputs, dtype):
        super().__init__()
        self.values, self.scale, self.inputs = values, scale, inputs

    @property
    def int4_weight(self) -> Int4Weight:
        return Int4Weight(self.values, self.scale, self.inputs)

    def dequantize(self) -> torch.Tensor:
        """The matrix, in the dtype of the weights that were rounded."""
        return reference.dense_weight(self.int4_weight).to(self.dtype)


torch.serialization.add_safe_globals([Int4Tensor])


@Int4Tensor.implements_torch_function(F.linear)
def _(function, types, args, kwargs):
    return _linear(*args, **(kwargs or {}))


def _linear(input, weight, bias=None):
    given = (input, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return F.linear(input, weight.dequantize().to(input.dtype), bias)
    y = linear(input.flatten(0, -2), weight.int4_weight, bias)
    return y.unflatten(0, input.shape[:-1])


def round_to_int8(model: PreTrainedModel) -> None:
    """Round the matrices of all linear layers to 8 bits in place, one scale per output."""
    quantize_(model, Int8WeightOnlyConfig())


def round_to_int4(model: PreTrainedModel) -> None:
    """Round the matrices of linear layers to 4 bits in place, one scale per 32 neighbours in a row;
    those of a Rodimus block's gates and of the language model's head are rounded to 8 bits."""
    head = model.get_output_embeddings()
    layers = {name: x for name, x in model.named_modules() if isinstance(x, nn.Linear)}
    wide = {n for n, x in layers.items() if x is head or any(part in n for part in _IN_8_BITS)}
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in wide)
    for name in layers.keys() - wide:
        layer = layers[name]
        packed = quantize_int4(layer.weight)
        tensor = Int4Tensor(*packed, layer.weight.dtype)
        layer.weight = nn.Parameter(tensor, requires_grad=False)
