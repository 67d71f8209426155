"""State files: whole and of this model, or refused with a reason."""

import contextlib
import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from rodimus.errors import InputError
from rodimus.generation import Engine, Request, load_state, save_state, state_file
from rodimus.generation.state_file import fingerprint
from rodimus.loading import quantizer
from tests.generation.helpers import greedy, prompts_of
from tests.model.helpers import build, config_of, enliven, model_of


@pytest.fixture
def saved(plus, tmp_path):
    """A file, its model, and the 30 tokens it read."""
    (prompt,) = prompts_of(30)
    path = tmp_path / "prefix.state"
    save_state(path, Engine(plus).read(prompt), plus)
    return path, plus, prompt


@pytest.mark.parametrize("length", [1, 5, 30])
def test_a_text_goes_on_from_a_file_in_another_engine(model, tmp_path, length):
    (prompt,) = prompts_of(length + 6)
    save_state(tmp_path / "x", Engine(model).read(prompt[:length]), model)
    engine = Engine(model, slots=2)
    engine.add_prefix(load_state(tmp_path / "x", model))
    found = engine.generate([Request(prompt, 20)])[0]
    assert found.prefix_tokens == length and found.tokens == greedy(model, prompt, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_comes_back_bit_for_bit(model, tmp_path, dtype):
    model = model.to(dtype)
    state = Engine(model).read(prompts_of(20)[0])
    strided = state.convolution.mT.contiguous().mT
    save_state(tmp_path / "x", replace(state, convolution=strided), model)
    found = load_state(tmp_path / "x", model)
    for kind in ("tokens", "recurrent", "convolution", "window"):
        assert torch.equal(getattr(found, kind), getattr(state, kind))
        assert getattr(found, kind).dtype == getattr(state, kind).dtype


def test_a_single_token_may_be_one_of_a_column(plus, tmp_path):
    state = replace(Engine(plus).read([0]), tokens=torch.tensor([[0, 6]])[:, 0])
    assert state.tokens.stride() == (2,)
    save_state(tmp_path / "x", state, plus)
    assert load_state(tmp_path / "x", plus).tokens.tolist() == [0]


def test_a_state_of_another_model_is_not_written(plus, tmp_path):
    state = Engine(plus).read(prompts_of(20)[0])
    deeper = build(config_of("rodimus_plus") | {"n_layer": 3})
    others = {"convolution": model_of("rodimus_plus").bfloat16(), "recurrent": deeper}
    for kind, other in others.items():
        with pytest.raises(ValueError, match=f"{kind} of the state must be torch"):
            save_state(tmp_path / "x", state, other)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [255, 256])
def test_a_name_as_long_as_names_can_be(plus, tmp_path, length):
    path, state = tmp_path / ("x" * length), Engine(plus).read([1, 2])
    if length == 255:
        save_state(path, state, plus)
        assert load_state(path, plus).tokens.tolist() == [1, 2]
    else:
        with pytest.raises(InputError, match="cannot be written: File name too long"):
            save_state(path, state, plus)


def test_what_is_no_file_is_not_replaced_by_one(plus, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match="it is no regular file"):
            save_state(path, Engine(plus).read([1]), plus)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_folder_that_is_none_is_an_error_of_its_own(saved):
    path, model, _ = saved
    for folder, why in ((path, "Not a directory"), (path.with_name("x"), "No such file")):
        with pytest.raises(InputError, match=f"cannot be written: {why}"):
            save_state(folder / "y", Engine(model).read([1]), model)


def test_the_header_says_what_it_is(saved):
    path, model, _ = saved
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["tokens"] == "30" and header["dtype"] == "float32"
    assert json.loads(header["config"])["n_layer"] == model.config.n_layer
    assert header["fingerprint"] == fingerprint(model)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_a_truncated_file_is_refused(saved, keep):
    path, model, _ = saved
    data = path.read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep
    path.write_bytes(data[:size])
    with pytest.raises(InputError, match="cut short"):
        load_state(path, model)


def test_every_flipped_bit_is_refused(saved):
    path, model, _ = saved
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), max(len(data) // 60, 1)):
        damaged = bytearray(data)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            load_state(path, model)


@pytest.mark.parametrize("change", ["seed", "one weight", "order", "dtype", "adapter"])
def test_a_file_of_other_weights_is_refused(saved, change):
    path, model, _ = saved
    if change == "seed":
        enliven(model, seed=1)
    elif change == "one weight":
        with torch.no_grad():
            model.model.layers[1].mixer.fc.weight[13, 17] += 1e-3
    elif change == "order":
        weight = model.model.layers[1].mixer.fc.weight.data
        weight[2:] = weight[2:].flip(0)
        assert weight[:2].numel() > 64
    elif change == "dtype":
        model = model.to(torch.bfloat16)
    else:
        model.model.layers[0].mixer.fc.adapter = nn.Linear(2, 2)
    with pytest.raises(InputError, match="of another model: same architecture"):
        load_state(path, model)


@pytest.mark.parametrize("change", ["another scale", "another adapter", "no adapter", "nothing"])
def test_a_file_of_other_adapters_in_use_is_refused(plus, tmp_path, change):
    """The weights are the same; what PEFT makes of them is not."""
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_modules": ["fc"], "init_lora_weights": False}
    tuned = peft.get_peft_model(plus, peft.LoraConfig(lora_alpha=8, **options))
    tuned.add_adapter("other", peft.LoraConfig(lora_alpha=8, **options))
    model, path, (prompt,) = tuned.get_base_model(), tmp_path / "x", prompts_of(30)
    save_state(path, Engine(model).read(prompt), model)
    in_use = contextlib.nullcontext()
    if change == "another scale":
        model.model.layers[0].mixer.fc.scaling["default"] *= 8
    elif change == "another adapter":
        tuned.set_adapter("other")
    elif change == "no adapter":
        in_use = tuned.disable_adapter()
    refused = pytest.raises(InputError, match="of another model: same architecture")
    with in_use, contextlib.nullcontext() if change == "nothing" else refused:
        load_state(path, model)


def test_adapters_without_a_scale_count(plus):
    peft = pytest.importorskip("peft")
    before = fingerprint(plus)
    peft.get_peft_model(plus, peft.IA3Config(target_modules=["fc"], feedforward_modules=[]))
    assert fingerprint(plus) != before


@pytest.mark.parametrize("kind, field", [("rodimus", "block_type"), ("grouped", "mixer_cfg")])
def test_a_file_of_another_architecture_is_refused_by_field(saved, kind, field):
    path, _, _ = saved
    with pytest.raises(InputError, match=f"of another model: {field} is"):
        load_state(path, model_of(kind))


@pytest.mark.parametrize(
    "field, value",
    [
        *(("d_model", 65), ("vocab_size", 98), ("norm_epsilon", 0.5), ("attn_cfg", {})),
        *(("use_scale_embedding", True), ("use_norm_embedding", True), ("residual_in_fp32", False)),
    ],
)
def test_a_file_of_another_setting_is_refused_by_field(saved, field, value):
    path, model, _ = saved
    theirs = getattr(model.config, field)
    setattr(model.config, field, value)
    with pytest.raises(InputError) as refused:
        load_state(path, model)
    assert f"{field} is {theirs}, this model's is {value}" in str(refused.value)


def test_other_files_are_refused(tmp_path, plus):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_state(tmp_path / "nothing", plus)
    with pytest.raises(InputError, match="expected a state file, got the folder "):
        load_state(tmp_path, plus)
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(InputError, match="not a state file: its format is None"):
        load_state(tmp_path / "weights", plus)


def test_tensors_that_do_not_fit_the_header_are_refused(saved):
    path, model, _ = saved
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {kind: file.get_tensor(kind) for kind in file.keys()}
    save_file(tensors | {"window": tensors["window"][:, 1:].contiguous()}, path, metadata=header)
    with pytest.raises(InputError, match=r"window must have shape .* got \(2, 7, 80\)"):
        load_state(path, model)
    save_file(tensors | {"tokens": tensors["tokens"][1:].contiguous()}, path, metadata=header)
    with pytest.raises(InputError, match=r"the 30 tokens it read, got \(29,\)"):
        load_state(path, model)
    save_file(tensors | {"tokens": tensors["tokens"][None]}, path, metadata=header)
    with pytest.raises(InputError, match=r"the 30 tokens it read, got \(1, 30\)"):
        load_state(path, model)
    save_file(tensors | {"more": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(InputError, match="must hold tokens, .*; got .*more"):
        load_state(path, model)
    nothing = {"tokens": tensors["tokens"][:0], "window": tensors["window"][:, :0]}
    save_file(tensors | nothing, path, metadata=header | {"tokens": "0"})
    with pytest.raises(InputError, match=r"the 0 tokens it read, got \(0,\)"):
        load_state(path, model)
    save_file(tensors, path, metadata=header | {"version": "2"})
    with pytest.raises(InputError, match="has version '2' of the format, expected '1'"):
        load_state(path, model)
    tensors.pop("window")
    save_file(tensors, path, metadata=header)
    with pytest.raises(InputError, match="must hold tokens, recurrent, convolution, window"):
        load_state(path, model)


def forge(path, header, tensors):
    """A file with a SHA-256 that is right."""
    header = header | {"sha256": state_file._digest(header, tensors)}
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize("config", ["[]", "3", "null", "[" * 100_000, '[["a"]]'], ids=len)
def test_a_header_with_something_else_for_a_configuration_is_refused(saved, config):
    path, model, _ = saved
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {kind: file.get_tensor(kind) for kind in file.keys()}
    forge(path, header | {"config": config}, tensors)
    with pytest.raises(InputError, match="no configuration|another model"):
        load_state(path, model)
    header.pop("config")
    forge(path, header, tensors)
    with pytest.raises(InputError, match="its header holds no configuration"):
        load_state(path, model)


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("tokens", lambda x: x.float(), "tokens as int64"),
        ("tokens", lambda x: x - x.max() + 97, "tokens as int64 from 0 to 96"),
        ("tokens", lambda x: x - x.min() - 1, "tokens as int64 from 0 to 96"),
        ("recurrent", lambda x: x.bfloat16(), "recurrent of the state must be torch.float32"),
        ("window", lambda x: x.half(), "window of the state must be torch.float32"),
    ],
)
def test_tensors_of_other_kinds_are_refused_though_the_digest_is_right(saved, kind, change, match):
    path, model, _ = saved
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {kind: file.get_tensor(kind) for kind in file.keys()}
    forge(path, header, tensors | {kind: change(tensors[kind])})
    with pytest.raises(InputError, match=match):
        load_state(path, model)


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_that_are_no_parameters_count(plus, tmp_path):
    quantization = pytest.importorskip("torch.ao.quantization")
    quantised = lambda model: quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    model = quantised(plus)
    save_state(tmp_path / "x", Engine(model).read([1, 2]), model)
    assert load_state(tmp_path / "x", model).tokens.tolist() == [1, 2]
    with torch.no_grad():
        plus.model.layers[0].mixer.fc.weight.mul_(2)
    with pytest.raises(InputError, match="of another model"):
        load_state(tmp_path / "x", quantised(plus))


@pytest.mark.filterwarnings("ignore")
def test_weights_in_classes_of_their_own_count(plus):
    pytest.importorskip("torchao")
    quantizer("int8")(plus)
    weight, before = plus.model.layers[0].mixer.fc.weight, fingerprint(plus)
    assert type(weight) is not nn.Parameter and fingerprint(plus) == before
    weight.scale.mul_(2)
    assert fingerprint(plus) != before


def test_every_weight_is_read_once(plus, monkeypatch):
    read = []
    monkeypatch.setattr(state_file, "_add_tensor", lambda digest, name, value: read.append(value))
    assert plus.lm_head.weight is plus.get_input_embeddings().weight
    fingerprint(plus)
    assert len({value.data_ptr() for value in read}) == len(read) == len(list(plus.parameters()))


def test_the_order_of_parts_does_not_count(plus):
    before, block = fingerprint(plus), plus.model.layers[0]
    block._modules = dict(reversed(block._modules.items()))
    assert fingerprint(plus) == before


def test_buffers_count(plus):
    plus.register_buffer("packed", torch.tensor([1, 2], dtype=torch.uint8))
    before, packed = fingerprint(plus), plus.packed.clone()
    plus.packed[1] = 3
    assert fingerprint(plus) != before
    # so do its dtype, its shape and its name
    plus.packed = packed.view(torch.int8)
    assert fingerprint(plus) != before
    plus.packed = packed[None]
    assert fingerprint(plus) != before
    del plus.packed
    plus.register_buffer("other", packed)
    assert fingerprint(plus) != before


def test_a_write_that_fails_leaves_the_old_file(saved, monkeypatch):
    path, model, _ = saved
    before = path.read_bytes()

    def fails(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(InputError, match="No space left on device"):
        save_state(path, Engine(model).read([1, 2]), model)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_model_without_a_window_keeps_everything(tmp_path):
    config = config_of("rodimus_plus")
    config["attn_cfg"] |= {"window_size": None}
    model = build(config)
    (prompt,) = prompts_of(40)
    save_state(tmp_path / "x", Engine(model, max_length=60).read(prompt[:30]), model)
    engine = Engine(model, max_length=60)
    engine.add_prefix(load_state(tmp_path / "x", model))
    assert engine.generate([Request(prompt, 9)])[0].tokens == greedy(model, prompt, 9)
