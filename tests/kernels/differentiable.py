"""Operators whose gradient is an operator of its own: a call of each, and the shapes it takes."""

import pytest
import torch

import rodimus_kernels as rk
from tests.kernels.device import DEVICE, TRITON_MARKS


def triton(name, call, *shapes):
    return pytest.param(call, shapes, id=name, marks=TRITON_MARKS)


def short_conv_with_states(x, weight, bias, state):
    return rk.short_conv(
        x, weight, bias, initial_state=state, output_final_state=True, impl="triton"
    )


KEYS, VALUES = (1, 3, 1, 16), (1, 3, 1, 16)
OPERATORS = [
    pytest.param(
        lambda q, k, v, g: rk.ddts(q, k, v, -g.abs(), impl="eager")[0],
        (KEYS, KEYS, VALUES, KEYS),
        id="ddts eager",
    ),
    pytest.param(
        lambda x, w: rk.linear_cross_entropy(x, w, torch.tensor([1, 0], device=DEVICE))[0],
        ((2, 4), (3, 4)),
        id="linear_cross_entropy",
    ),
    triton(
        "ddts",
        lambda q, k, v, g: rk.ddts(q, k, v, -g.abs(), impl="triton_chunk")[0],
        KEYS,
        KEYS,
        VALUES,
        KEYS,
    ),
    triton("ddts_gates", lambda *x: rk.ddts_gates(*x, impl="triton")[0], KEYS, KEYS, KEYS),
    triton(
        "shared_key_attention",
        lambda *x: rk.shared_key_attention(*x, window_size=2, impl="triton"),
        KEYS,
        KEYS,
        VALUES,
    ),
    triton("short_conv", lambda *x: rk.short_conv(*x, impl="triton")[0], (1, 3, 8), (8, 4)),
    triton(
        "short_conv with everything",
        lambda *x: sum(y.sum() for y in short_conv_with_states(*x)),
        (1, 3, 8),
        (8, 4),
        (8,),
        (1, 8, 4),
    ),
    triton("rms_norm", lambda *x: rk.rms_norm(*x, impl="triton"), (3, 8), (8,)),
    triton("input_gate", lambda *x: rk.input_gate(*x, impl="triton"), (3, 8), (3, 4), (8, 4), (8,)),
    triton(
        "add_rms_norm", lambda *x: sum(rk.add_rms_norm(*x, impl="triton")), (3, 8), (3, 8), (8,)
    ),
    triton(
        "gated_rms_norm",
        lambda x, g, w, r, s: rk.gated_rms_norm(
            x, g, w, residual=r, residual_weight=s, impl="triton"
        ),
        (3, 8),
        (3, 8),
        (8,),
        (3, 8),
        (8,),
    ),
    triton("swiglu", lambda x: rk.swiglu(x, impl="triton"), (3, 16)),
]
