"""Whichever tensor of an operator is of another shape, elsewhere, or of no floating dtype: it is
refused by name, where a kernel would read memory that is not the tensor's."""

import pytest
import torch

import rodimus_kernels as rk

B, T, K, V, W = 2, 3, 4, 6, 4


def named(**shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


TOKEN, KEYS, VALUES, STATE = (B, 1, K), (B, T, 1, K), (B, T, 1, V), (B, 1, K, V)
RAW = {"q": KEYS, "k": KEYS, "v": VALUES}
HEADS = {"q": (B, T, 2, K), "k": (B, T, 1, K), "v": (B, T, 2, V)}
CASES = {
    rk.ddts_gates: named(k=KEYS, select=KEYS, temper=KEYS),
    rk.ddts: named(**RAW, log_decay=KEYS, initial_state=STATE),
    rk.ddts_step: named(q=TOKEN, k=TOKEN, v=(B, 1, V), log_decay=TOKEN, state=STATE),
    rk.gated_ddts: named(**RAW, select=KEYS, temper=KEYS, initial_state=STATE),
    rk.ddts_mixer_step: named(
        **dict.fromkeys(("q", "k", "select", "temper"), (B, K)),
        **dict.fromkeys(("x", "shifted", "gate"), (B, V)),
        **dict.fromkeys(("gate_bias", "residual_weight", "norm_weight"), (V,)),
        gate_hidden=(B, 2),
        gate_weight=(V, 2),
        state=STATE,
    ),
    rk.ddts_summary: named(k=KEYS, v=VALUES, log_decay=KEYS),
    rk.ddts_scan: named(states=(T, *STATE), log_decays=(T, B, 1, K)),
    rk.rope: named(x=KEYS, cos=(B, T, 1), sin=(B, T, 1)),
    rk.shared_key_attention: named(**HEADS),
    rk.shared_key_attention_step: named(**HEADS, cache=(B, 9, K + 2 * V))
    | {"position": torch.zeros(B, dtype=torch.int64)},
    rk.short_conv: named(x=(B, T, V), weight=(V, W), bias=(V,), initial_state=(B, V, W)),
    rk.short_conv_step: named(x=(B, V), conv_state=(B, V, W), weight=(V, W), bias=(V,)),
    rk.rms_norm: named(x=(B, V), weight=(V,)),
    rk.add_rms_norm: named(x=(B, V), residual=(B, V), weight=(V,)),
    rk.gated_rms_norm: named(
        x=(B, V), gate=(B, V), weight=(V,), residual=(B, V), residual_weight=(V,)
    ),
    rk.input_gate: named(x=(B, V), hidden=(B, K), weight=(V, K), bias=(V,)),
    rk.linear: named(x=(B, K), weight=(V, K), bias=(V,)),
    rk.linear_cross_entropy: named(hidden=(B, K), weight=(V, K))
    | {"labels": torch.zeros(B, dtype=torch.int64)},
}
OPTIONS = {rk.shared_key_attention_step: {"window_size": 5}}
MIXER = "q k select temper x shifted gate gate_bias residual_weight norm_weight"
FLOATING = {
    rk.ddts_gates: "k select temper",
    rk.ddts: "q k v log_decay initial_state",
    rk.ddts_step: "q k v log_decay",
    rk.gated_ddts: "q k v select temper initial_state",
    rk.ddts_mixer_step: f"{MIXER} gate_hidden gate_weight state",
    rk.ddts_summary: "k v log_decay",
    rk.ddts_scan: "states log_decays",
    rk.rope: "x cos sin",
    rk.shared_key_attention: "q k v",
    rk.shared_key_attention_step: "q k v cache",
    rk.short_conv: "x weight bias initial_state",
    rk.short_conv_step: "x conv_state weight bias",
    rk.rms_norm: "x weight",
    rk.add_rms_norm: "x residual weight",
    rk.gated_rms_norm: "x gate weight residual residual_weight",
    rk.input_gate: "x hidden weight bias",
    rk.linear: "bias",
    rk.linear_cross_entropy: "hidden weight",
}


def of_each(tensors):
    return pytest.mark.parametrize(
        "operator, name",
        [
            pytest.param(operator, name, id=f"{operator.__name__}-{name}")
            for operator, names in tensors.items()
            for name in names
        ],
    )


def call(operator, **changed):
    return operator(**CASES[operator] | changed, **OPTIONS.get(operator, {}))


@pytest.mark.parametrize("operator", CASES, ids=lambda operator: operator.__name__)
def test_the_cases_are_good_input(operator):
    call(operator)


@of_each(CASES)
def test_another_shape(operator, name):
    with pytest.raises(ValueError, match=r"must have shape \[.*\], got \(|^cos must be \["):
        call(operator, **{name: CASES[operator][name].unsqueeze(-1)})


@of_each(CASES)
def test_another_device(operator, name):
    with pytest.raises(ValueError, match=r"must be on the device of \w+ \((cpu|meta)\), got"):
        call(operator, **{name: CASES[operator][name].to("meta")})


OF_FLOATING = of_each({operator: names.split() for operator, names in FLOATING.items()})


@OF_FLOATING
def test_integers(operator, name):
    with pytest.raises(ValueError, match=f"{name} must be floating point, got torch.int64"):
        call(operator, **{name: CASES[operator][name].long()})


@OF_FLOATING
def test_an_array(operator, name):
    with pytest.raises(ValueError, match="must be a tensor, got ndarray"):
        call(operator, **{name: CASES[operator][name].numpy()})


# None means that there is none.
OPTIONAL = {"bias", "initial_state", "residual", "residual_weight"}


@of_each(
    {operator: [x for x in tensors if x not in OPTIONAL] for operator, tensors in CASES.items()}
)
def test_no_tensor(operator, name):
    with pytest.raises(ValueError, match=f"^{name} must be a tensor, got NoneType"):
        call(operator, **{name: None})


def test_a_state_of_the_mixer_with_strides():
    state = torch.zeros(B, 1, V, K).transpose(2, 3)
    with pytest.raises(ValueError, match=r"state must be contiguous, got strides \(24, 24, 1, 4\)"):
        call(rk.ddts_mixer_step, state=state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_ring_that_is_expanded(dtype):
    """Its sequences would overwrite each other's tokens; torch itself only warns."""
    k, v = (CASES[rk.shared_key_attention_step][name] for name in "kv")
    (heads, dim), (value_heads, value_dim) = k.shape[2:], v.shape[2:]
    width = heads * dim + value_heads * value_dim
    if dtype == torch.uint8:
        width = rk.int8_row_bytes(heads, dim, value_heads, value_dim, k.dtype)
    ring = torch.zeros(1, 16, width, dtype=dtype).expand(B, -1, -1)
    with pytest.raises(ValueError, match=r"cache must not be expanded: .* got strides \(0, "):
        call(rk.shared_key_attention_step, cache=ring)


def test_quantised_weights_elsewhere_are_no_less_a_weight():
    """They are no tensor, and have a device."""
    weight = rk.quantize_int4(torch.ones(V, K))
    elsewhere = weight._replace(values=weight.values.to("meta"), scale=weight.scale.to("meta"))
    with pytest.raises(ValueError, match=r"weight must be on the device of x \(cpu\), got meta"):
        rk.linear(torch.zeros(B, K), elsewhere)
