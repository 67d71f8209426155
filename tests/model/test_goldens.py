"""The model and its operators equal the original implementation, tensor by tensor.

Tolerances are absolute (logits are of order 10) and set by the goldens' own noise: fp32 goldens lie
7e-6 from a float64 model in the logits and 2e-6 in the gradients, bf16-attention ones 6e-3.
"""

import json

import pytest
import torch

import rodimus_kernels
from rodimus import RodimusConfig, RodimusForCausalLM
from rodimus_kernels import reference
from tests.device import ON_BOTH, here
from tests.model.golden_data import (
    BLOCK_TYPES,
    GOLDENS,
    golden_config,
    golden_notes,
    golden_tensors,
    golden_weights,
    l2_error,
    max_error,
)
from tests.model.helpers import build, golden_model
from tests.model.oracle import Oracle, RoundedOracle
from tests.model.ways import SHARE, full

pytestmark = ON_BOTH

TABLE = "largest error per golden group"
LOGITS, LOGITS_STRONG, LOGITS_BF16 = 5e-5, 2e-4, 3e-2
HIDDEN, LOSS, STATE, GRAD, GRAD_BF16 = 2e-5, 5e-6, 2e-5, 1e-4, 5e-2

VARIANTS = [("rodimus", "fp32"), ("rodimus_plus", "fp32"), ("rodimus_plus", "bf16attn")]
every_variant = pytest.mark.parametrize(
    "block_type, variant", VARIANTS, ids=["-".join(v) for v in VARIANTS]
)
OPERATORS = {"public": rodimus_kernels, "reference": reference}
every_operator_module = pytest.mark.parametrize("operators", OPERATORS)


def goldens_of(block_type, variant):
    """``(model, tensors, notes, whether the tight tolerances apply)``."""
    name = f"golden_{variant}"
    exact = variant == "fp32"
    return (
        golden_model(block_type),
        golden_tensors(block_type, name),
        golden_notes(block_type, name),
        exact,
    )


def row(name, variant):
    return name if variant == "fp32" else f"{name} {variant}"


def valid(golden, tag):
    """Mask of the positions that are defined; everywhere unless the batch is padded."""
    mask = golden.get(f"{tag}.attention_mask")
    return torch.ones_like(golden[f"{tag}.input_ids"]) if mask is None else mask


# ------------------------------------------------------------------------------------- whole model


@pytest.mark.parametrize("tag", ["T40", "T7", "pad"])
@every_variant
def test_logits_and_loss(block_type, variant, tag, measure):
    model, golden, _, exact = goldens_of(block_type, variant)
    out = model(
        golden[f"{tag}.input_ids"],
        attention_mask=golden.get(f"{tag}.attention_mask"),
        labels=golden[f"{tag}.labels"],
    )
    real = valid(golden, tag).bool()
    error = max_error(out.logits[real], golden[f"{tag}.logits"][real])
    measure(
        TABLE, row(f"{tag}.logits", variant), block_type, error, LOGITS if exact else LOGITS_BF16
    )
    error = max_error(out.loss, golden[f"{tag}.loss"])
    measure(TABLE, row(f"{tag}.loss", variant), block_type, error, LOSS if exact else 1e-3)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_logits_in_bf16(block_type, measure):
    """Weights and arithmetic in bf16: no further from the float32 goldens than roundings allow."""
    model, golden, _, _ = goldens_of(block_type, "fp32")
    ids, expected = golden["T40.input_ids"], golden["T40.logits"]
    model = model.to(torch.bfloat16)
    oracle = RoundedOracle(golden_config(block_type), dict(model.named_parameters()))
    bound = SHARE * l2_error(oracle(ids), expected)
    error = l2_error(full(model, ids), expected)
    measure(TABLE, "T40.logits in bf16 (relative L2)", block_type, error, bound)


@pytest.mark.parametrize("tag", ["T40", "T7", "pad"])
@every_variant
def test_gradients_of_every_parameter(block_type, variant, tag, measure):
    model, golden, notes, exact = goldens_of(block_type, variant)
    model.train()
    model(
        golden[f"{tag}.input_ids"],
        attention_mask=golden.get(f"{tag}.attention_mask"),
        labels=golden[f"{tag}.labels"],
    ).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = notes["grad_norms"][tag]
    assert set(gradients) == set(norms)
    bound = GRAD if exact else GRAD_BF16
    for name, norm in norms.items():
        error = abs(gradients[name].double().norm().item() - norm) / norm
        measure(TABLE, row(f"{tag}.grad norms", variant), block_type, error, bound)
        if f"{tag}.grad.{name}" in golden:
            error = l2_error(gradients[name], golden[f"{tag}.grad.{name}"])
            measure(TABLE, row(f"{tag}.grad (relative L2)", variant), block_type, error, bound)


@pytest.mark.parametrize("tag", ["T40", "T7"])
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_residual_stream_and_what_enters_it(block_type, tag, measure):
    model, golden, _, _ = goldens_of(block_type, "fp32")
    added = {}
    for index, layer in enumerate(model.model.layers):
        last = layer.ffn if block_type == "rodimus_plus" else layer.mixer
        last.register_forward_hook(
            lambda module, args, out, index=index: added.update({index: first_tensor(out)})
        )
    out = model(golden[f"{tag}.input_ids"], output_hidden_states=True)
    depth = len(model.model.layers)
    assert len(out.hidden_states) == depth + 1
    for index in range(depth):
        error = max_error(out.hidden_states[index], golden[f"{tag}.residual_stream.{index}"])
        measure(TABLE, f"{tag}.residual_stream", block_type, error, HIDDEN)
    for index in range(1, depth):
        error = max_error(added[index - 1], golden[f"{tag}.hidden_states.{index}"])
        measure(TABLE, f"{tag}.hidden_states (what a block adds)", block_type, error, HIDDEN)
    error = max_error(out.hidden_states[-1], golden[f"{tag}.last_hidden"])
    measure(TABLE, f"{tag}.last_hidden", block_type, error, 2 * HIDDEN)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_strong_gates(block_type, measure):
    """Decays down to -40 a step, judged by the float64 oracle, gradients included."""
    weights = {
        name: weight * 8 if name.endswith("mem_gate_proj.weight") else weight
        for name, weight in golden_weights(block_type).items()
    }
    golden = golden_tensors(block_type)
    ids, labels = golden["T40.input_ids"], golden["T40.labels"]
    model = build(golden_config(block_type), weights).train()
    oracle = Oracle(golden_config(block_type), weights)
    expected = oracle(ids)
    decays = [value for name, value in oracle.trace.items() if name.endswith("log_decay")]
    assert min(decay.min() for decay in decays) < -15
    out = model(ids, labels=labels)
    measure(TABLE, "strong.logits", block_type, max_error(out.logits, expected), LOGITS_STRONG)
    out.loss.backward()
    oracle.loss(ids, labels).backward()
    for name, parameter in model.named_parameters():
        error = l2_error(parameter.grad, oracle.weights[name].grad)
        measure(TABLE, "strong.grad (relative L2)", block_type, error, GRAD)


# -------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("tag", ["greedy13", "greedy5"])
@every_variant
def test_greedy_teacher_forced(block_type, variant, tag, measure):
    model, golden, _, exact = goldens_of(block_type, variant)
    prompt, tokens = golden[f"{tag}.prompt"], golden[f"{tag}.tokens"]
    with torch.no_grad():
        logits = model(torch.cat((prompt, tokens[:, :-1]), 1)).logits[:, prompt.shape[1] - 1 :]
    bound = LOGITS if exact else LOGITS_BF16
    error = max_error(logits, golden[f"{tag}.logits"])
    measure(TABLE, row(f"{tag}.logits full forward", variant), block_type, error, bound)
    sure = golden[f"{tag}.margin"] > 2 * bound
    assert (logits.argmax(-1) == tokens)[sure].all() and sure.float().mean() > 0.5


@pytest.mark.parametrize("tag", ["greedy13", "greedy5"])
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_greedy_cached(block_type, tag, measure):
    """The prompt at once, then token by token through the cache, past the window."""
    model, golden, _, _ = goldens_of(block_type, "fp32")
    prompt, tokens = golden[f"{tag}.prompt"], golden[f"{tag}.tokens"]
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        steps = [out.logits[:, -1]]
        for token in tokens[:, :-1].T:
            out = model(token[:, None], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[:, -1])
    error = max_error(torch.stack(steps, 1), golden[f"{tag}.logits"])
    measure(TABLE, f"{tag}.logits cached", block_type, error, LOGITS)
    for index, layer in enumerate(out.past_key_values.layers):
        if f"{tag}.final_ssm_state.{index}" not in golden:
            continue
        states = layer.conv_states[0], layer.recurrent_states[0]
        errors = state_errors(states, golden, f"{tag}.final_", index)
        for part, error in errors.items():
            measure(TABLE, f"{tag}.final {part}", block_type, error, STATE)


@pytest.mark.parametrize("tag", ["greedy13", "greedy5"])
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_generate_gives_the_golden_tokens(block_type, tag):
    model, golden, _, _ = goldens_of(block_type, "fp32")
    prompt, tokens = golden[f"{tag}.prompt"], golden[f"{tag}.tokens"]
    assert golden[f"{tag}.margin"].min() > 2 * LOGITS
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens.shape[1],
        do_sample=False,
    )
    assert torch.equal(out[:, prompt.shape[1] :], tokens)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_states_after_prefill(block_type, measure):
    model, golden, _, _ = goldens_of(block_type, "fp32")
    with torch.no_grad():
        cache = model(golden["prefill.input_ids"], use_cache=True).past_key_values
    depth = sum(name.startswith("prefill.ssm_state") for name in golden)
    assert depth == len(cache.layers)
    for index, layer in enumerate(cache.layers):
        states = layer.conv_states[0], layer.recurrent_states[0]
        for part, error in state_errors(states, golden, "prefill.", index).items():
            measure(TABLE, f"prefill.{part}", block_type, error, STATE)


def state_errors(states, golden, prefix, index):
    """Errors of a layer's ``(conv, recurrent)`` states; the conv keeps d_conv - 1 taps or more."""
    conv, recurrent = states
    expected = golden[f"{prefix}conv_state.{index}"]
    taps = min(conv.shape[-1], expected.shape[-1])
    assert taps >= expected.shape[-1] - 1
    assert recurrent.dtype == torch.float32
    return {
        "conv_state": max_error(conv[..., -taps:], expected[..., -taps:]),
        "ssm_state": max_error(recurrent, golden[f"{prefix}ssm_state.{index}"]),
    }


# ------------------------------------------------------------------------------- parts of layer 0


def run_part(model, part, hidden):
    """What ``model.layers[0].<part>`` makes of ``hidden``, whatever its other arguments are."""
    seen = []
    module = getattr(model.model.layers[0], part)
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: replace_first(args, kwargs, hidden), with_kwargs=True
        ),
        module.register_forward_hook(lambda module, args, out: seen.append(first_tensor(out))),
    ]
    model(hidden.new_zeros(hidden.shape[:2], dtype=torch.long), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen[0]


def replace_first(args, kwargs, value):
    """The call's first argument, however it was passed, exchanged for ``value``."""
    if args:
        return (value, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): value}


def first_tensor(out):
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize(
    "block_type, variant, part, prefix",
    [
        ("rodimus", "fp32", "mixer", "ddts"),
        ("rodimus_plus", "fp32", "mixer", "ddts"),
        ("rodimus_plus", "fp32", "attn", "attn"),
        ("rodimus_plus", "bf16attn", "attn", "attn"),
        ("rodimus_plus", "fp32", "ffn", "ffn"),
    ],
)
def test_submodule(block_type, variant, part, prefix, measure):
    """Mixer, attention and ffn of layer 0: output, gradient of the input and of the parameters."""
    model, golden, notes, exact = goldens_of(block_type, variant)
    hidden = golden[f"{prefix}.hidden"].clone().requires_grad_()
    out = run_part(model, part, hidden)
    module = getattr(model.model.layers[0], part)
    parameters = dict(module.named_parameters())
    (out * golden[f"{prefix}.dout"]).sum().backward()
    bound = HIDDEN if exact else LOGITS_BF16
    grad_bound = GRAD if exact else GRAD_BF16
    measure(
        TABLE,
        row(f"{prefix}.out", variant),
        block_type,
        max_error(out, golden[f"{prefix}.out"]),
        bound,
    )
    error = l2_error(hidden.grad, golden[f"{prefix}.dhidden"])
    measure(TABLE, row(f"{prefix}.dhidden (relative L2)", variant), block_type, error, grad_bound)
    for name, parameter in parameters.items():
        if f"{prefix}.grad.{name}" in golden:
            error = l2_error(parameter.grad, golden[f"{prefix}.grad.{name}"])
            measure(
                TABLE, row(f"{prefix}.grad (relative L2)", variant), block_type, error, grad_bound
            )
        if name in notes["grad_norms"].get(prefix, {}):
            norm = notes["grad_norms"][prefix][name]
            error = abs(parameter.grad.norm().item() - norm) / norm
            measure(TABLE, row(f"{prefix}.grad norms", variant), block_type, error, grad_bound)


# --------------------------------------------------------------------------------------- operators


def add_head(x):
    """``[B, T, D]`` to ``[B, T, 1, D]``."""
    return x.unsqueeze(2)


@every_operator_module
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_gates_and_convolution(block_type, operators, measure):
    """From ``ddts.x`` to the q, k, v, log_decay that enter the recurrence."""
    ops, golden = OPERATORS[operators], golden_tensors(block_type)
    prefix = "model.layers.0.mixer.inner_mixer."
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in golden_weights(block_type).items()
        if name.startswith(prefix)
    }
    conv = weights["short_conv.conv1d.weight"].squeeze(1)
    shift, _ = ops.short_conv(golden["ddts.x"], conv, weights["short_conv.conv1d.bias"])
    _, k = (shift @ weights["in_proj.weight"].T).chunk(2, -1)
    gates = shift @ weights["mem_gate_proj.weight"].T + weights["mem_gate_proj.bias"]
    epsilon = golden_config(block_type)["mixer_cfg"]["normalize_epsilon"]
    k, log_decay = ops.ddts_gates(k, *gates.chunk(2, -1), eps=epsilon)
    for name, actual in {"shift": shift, "k": k, "log_decay": log_decay}.items():
        error = max_error(actual, golden[f"ddts.{name}"])
        measure(TABLE, f"ddts.{name} {operators}", block_type, error, HIDDEN)


@every_operator_module
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_recurrence(block_type, operators, measure):
    golden = golden_tensors(block_type)
    inputs = (add_head(golden[f"ddts.{name}"]) for name in ("q", "k", "v", "log_decay"))
    o, final_state = OPERATORS[operators].ddts(*inputs, output_final_state=True)
    error = max_error(o.squeeze(2), golden["ddts.o"])
    measure(TABLE, f"ddts.o {operators}", block_type, error, HIDDEN)
    error = max_error(final_state.squeeze(1), golden["ddts.final_state"])
    measure(TABLE, f"ddts.final_state {operators}", block_type, error, STATE)


@every_operator_module
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_recurrence_with_states_and_gradients(block_type, operators, measure):
    """``gla.*``: an initial state, cotangents of the output and of the final state."""
    golden = golden_tensors(block_type)
    leaves = {
        name: add_head(golden[f"ddts.{name}"]).requires_grad_()
        for name in ("q", "k", "v", "log_decay")
    }
    initial_state = golden["gla.initial_state"].unsqueeze(1).requires_grad_()
    o, final_state = OPERATORS[operators].ddts(
        *leaves.values(), initial_state=initial_state, output_final_state=True
    )
    error = max_error(o.squeeze(2), golden["gla.o"])
    measure(TABLE, f"gla.o {operators}", block_type, error, HIDDEN)
    error = max_error(final_state.squeeze(1), golden["gla.final_state"])
    measure(TABLE, f"gla.final_state {operators}", block_type, error, STATE)
    loss = (o.squeeze(2) * golden["gla.do"]).sum()
    (loss + (final_state.squeeze(1) * golden["gla.dfinal_state"]).sum()).backward()
    gradients = {f"d{name}": leaf.grad.squeeze(2) for name, leaf in leaves.items()}
    gradients["dinitial_state"] = initial_state.grad.squeeze(1)
    for name, gradient in gradients.items():
        error = l2_error(gradient, golden[f"gla.{name}"])
        measure(TABLE, f"gla.{name} {operators} (relative L2)", block_type, error, GRAD)


@every_operator_module
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_recurrence_by_steps(block_type, operators, measure):
    golden = golden_tensors(block_type)
    state = golden["gla.initial_state"].unsqueeze(1).clone()
    inputs = [add_head(golden[f"ddts.{name}"]) for name in ("q", "k", "v", "log_decay")]
    steps = [
        OPERATORS[operators].ddts_step(*(x[:, t] for x in inputs), state)
        for t in range(inputs[0].shape[1])
    ]
    error = max_error(torch.cat(steps, 1), golden["gla.o"])
    measure(TABLE, f"gla.o {operators} step by step", block_type, error, HIDDEN)
    error = max_error(state.squeeze(1), golden["gla.final_state"])
    measure(TABLE, f"gla.final_state {operators} step by step", block_type, error, STATE)


@every_operator_module
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_output_of_the_mixer(block_type, operators, measure):
    """From ``ddts.o`` to ``ddts.inner_out`` and ``ddts.out``: residual, gate, norm, projection."""
    ops, golden, weights = (
        OPERATORS[operators],
        golden_tensors(block_type),
        golden_weights(block_type),
    )
    prefix = "model.layers.0.mixer."
    normed = ops.gated_rms_norm(
        golden["ddts.o"],
        golden["ddts.gate"],
        weights[f"{prefix}act_norm.weight"],
        residual=golden["ddts.shift"],
        residual_weight=weights[f"{prefix}inner_mixer.residual_weight"],
    )
    error = max_error(normed @ weights[f"{prefix}out_proj.weight"].T, golden["ddts.out"])
    measure(TABLE, f"ddts.out {operators}", block_type, error, HIDDEN)
    normed = ops.gated_rms_norm(
        golden["ddts.inner_out"], golden["ddts.gate"], weights[f"{prefix}act_norm.weight"]
    )
    error = max_error(normed @ weights[f"{prefix}out_proj.weight"].T, golden["ddts.out"])
    measure(TABLE, f"ddts.out from inner_out {operators}", block_type, error, HIDDEN)


@every_operator_module
def test_attention(operators, measure):
    """RoPE and the window of w // 2 + 1 keys: ``attn.hidden`` to ``attn.context``."""
    ops = OPERATORS[operators]
    golden, weights = golden_tensors("rodimus_plus"), golden_weights("rodimus_plus")
    window = golden_config("rodimus_plus")["attn_cfg"]["window_size"] // 2 + 1
    q, k, v = (
        (golden["attn.hidden"] @ weights[f"model.layers.0.attn.{name}_proj.weight"].T).unflatten(
            -1, (-1, 16)
        )
        for name in "qkv"
    )
    cos, sin = reference.rope_tables(here(torch.arange(q.shape[1]))[None], 16)
    q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
    context = ops.shared_key_attention(q, k, v, window_size=window)
    for name, actual in {"q_rope": q, "k_rope": k.expand_as(q), "v": v, "context": context}.items():
        error = max_error(actual, golden[f"attn.{name}"])
        measure(TABLE, f"attn.{name} {operators}", "rodimus_plus", error, HIDDEN)
    rounded = golden_tensors("rodimus_plus", "golden_bf16attn")
    error = max_error(context, rounded["attn.context"])
    measure(TABLE, f"attn.context {operators} bf16attn", "rodimus_plus", error, LOGITS_BF16)


# ---------------------------------------------------------------------------------- released sizes


@pytest.mark.parametrize("size, total", [("1.6B", 1_607_095_296), ("1.4B", 1_531_551_744)])
def test_released_names_and_shapes(size, total):
    released = json.loads((GOLDENS / f"released_{size}_keys.json").read_text())
    with torch.device("meta"):
        model = RodimusForCausalLM(RodimusConfig.from_dict(released["config"]))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == released["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert total == released["total_parameters"]


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_released_folder_loads_as_it_is(block_type, measure):
    """``from_pretrained`` on a folder in the released format: every weight placed, same logits."""
    model, info = RodimusForCausalLM.from_pretrained(GOLDENS / block_type, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    golden = golden_tensors(block_type)
    with torch.no_grad():
        logits = here(model)(golden["T40.input_ids"]).logits
    error = max_error(logits, golden["T40.logits"])
    measure(TABLE, "T40.logits from_pretrained", block_type, error, LOGITS)
