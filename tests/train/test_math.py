"""The arithmetic of a step: accumulation, packing, schedules, groups, initial weights, FLOPs."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rodimus import RodimusConfig, RodimusForCausalLM
from rodimus.peers import PEERS
from rodimus.train import flops, parallel
from rodimus.train.config import GuardSection, OptimSection, ScheduleSection
from rodimus.train.guard import Guard, RunStopped
from rodimus.train.initialize import initialize, module_seed, template
from rodimus.train.load import load_config
from rodimus.train.loop import Trainer
from rodimus.train.optim import build_optimizers, is_decayed, parameter_groups
from rodimus.train.rows import IGNORE, ConcatRows, RowReader
from rodimus.train.schedule import lr_scale
from rodimus.train.shards import TokenShards
from tests.train.conftest import MODEL
from tests.train.ranks import metrics, run_ranks, train

CONFIG = {**MODEL, "vocab_size": 320}


def tiny(**changes):
    return RodimusForCausalLM(RodimusConfig(**{**CONFIG, **changes}))


def peer(kind):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320, "intermediate_size": 96}
    heads = {"gla": {"num_heads": 2}, "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2}}
    config_class, model_class = PEERS[kind]
    return model_class(config_class(**sizes, **heads[kind], tie_word_embeddings=True))


def loss_of(labels):
    """Arguments of a training forward."""
    return {
        "shift_labels": labels,
        "num_items_in_batch": labels.numel(),
        "loss_only": True,
        "use_cache": False,
    }


def test_accumulation_equals_one_large_batch(config_file, tmp_path):
    """The labels of a row depend on where documents begin, so the masks are ragged."""
    figures = {}
    for micro_batch in (1, 2, 4):
        run = tmp_path / f"micro{micro_batch}"
        options = ("--train.steps", 2, "--no-export", "--train.micro-batch", micro_batch)
        assert train(1, config_file, *options, "--out", run) == [0]
        figures[micro_batch] = {key: metrics(run, key) for key in ("loss", "grad_norm")}
    for micro_batch in (1, 2):
        for key, expected in figures[4].items():
            assert figures[micro_batch][key] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    "world, limit",
    [
        (2, 0.1),
        (1, 100.0),
        pytest.param(1, 0.1, marks=pytest.mark.slow),
        pytest.param(2, 100.0, marks=pytest.mark.slow),
    ],
)
def test_updates_are_made_with_the_rate_of_the_step_and_clipped_gradients(
    config_file, world, limit
):
    options = "--train.steps 4 --schedule.warmup-steps 2 --schedule.decay-frac 0.5 --optim.lr 0.01"
    options += f" --train.max-grad-norm {limit} --optim.name muon"

    def updates():
        config = load_config(config_file, options.split())
        trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
        seen = []

        def look(*_):
            rates = {g["lr"] for optimizer in trainer.optimizers for g in optimizer.param_groups}
            squares = [p.grad.full_tensor().square().sum() for p in trainer.model.parameters()]
            seen.append((rates, sum(squares).sqrt().item()))

        trainer.optimizers[0].register_step_pre_hook(look)
        reported = [trainer.step()["grad_norm"] for _ in range(config.steps)]
        trainer.close()
        scales = [lr_scale(step, config.steps, config.schedule) for step in range(config.steps)]
        return seen, reported, scales

    for seen, reported, scales in run_ranks(world, updates):
        assert len(set(scales)) == 4 and (max(reported) < limit or min(reported) > limit)
        assert [rates for rates, _ in seen] == [{0.01 * scale} for scale in scales]
        expected = [min(norm, limit) for norm in reported]
        assert [norm for _, norm in seen] == pytest.approx(expected, rel=1e-5)


def test_z_loss_steers_the_gradient_and_is_left_out_of_the_loss(config_file, tmp_path):
    figures = {}
    for name, micro_batch, z_loss in [("none", 4, 0.0), ("z", 4, 0.1), ("parts", 1, 0.1)]:
        run = tmp_path / name
        options = ("--train.micro-batch", micro_batch, "--train.z-loss", z_loss)
        options += ("--train.steps", 2, "--no-export", "--out", run)
        assert train(1, config_file, *options) == [0]
        figures[name] = {key: metrics(run, key) for key in ("loss", "grad_norm")}
    assert figures["z"]["loss"][1] == figures["none"]["loss"][1]
    assert abs(figures["z"]["grad_norm"][1] / figures["none"]["grad_norm"][1] - 1) > 0.01
    for key, expected in figures["z"].items():
        assert figures["parts"][key] == pytest.approx(expected, rel=2e-6)


def test_packed_documents_equal_each_document_alone(packed):
    model = tiny().double()
    shards = TokenShards(packed / "train.json")
    ids, labels, positions = RowReader(ConcatRows(shards, 96), mask_doc_start=True)(1)
    cuts = [*np.flatnonzero(positions == 0).tolist(), 96]
    assert len(cuts) > 2

    def run(a, b):
        rows = (torch.from_numpy(x[a:b].copy())[None] for x in (ids, labels, positions))
        out = model(
            **dict(zip(("input_ids", "shift_labels", "position_ids"), rows, strict=True)),
            num_items_in_batch=1,
            loss_only=True,
            use_cache=False,
        )
        out.loss.backward()
        return out.loss.item()

    whole = run(0, 96)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = sum(run(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True))
    assert whole == pytest.approx(alone, rel=1e-10)
    for packed_grad, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(packed_grad, p.grad, rtol=1e-6, atol=1e-10)


def test_label_of_a_document_start_is_masked(packed):
    shards = TokenShards(packed / "train.json")
    _, labels, positions = RowReader(ConcatRows(shards, 96), mask_doc_start=True)(1)
    assert (labels[:-1][positions[1:] == 0] == IGNORE).all()


def test_wsd_warms_up_stays_and_decays_to_zero():
    config = ScheduleSection(kind="wsd", warmup_steps=10, decay_frac=0.2, decay_shape="1-sqrt")
    scale = [lr_scale(step, 100, config) for step in range(100)]
    assert scale[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert scale[10:80] == [1.0] * 70
    assert scale[84] == pytest.approx(1 - 0.25**0.5)
    assert scale[-1] == 0.0


def test_wsd_decays_after_a_long_warm_up_only_and_not_at_all_where_asked():
    config = ScheduleSection(kind="wsd", warmup_steps=60, decay_frac=0.5, decay_shape="linear")
    scale = [lr_scale(step, 100, config) for step in range(100)]
    assert scale[59:] == pytest.approx([1 - i / 40 for i in range(41)])
    config = ScheduleSection(kind="wsd", warmup_steps=60, decay_frac=0.0)
    assert [lr_scale(step, 100, config) for step in range(59, 100)] == [1.0] * 41
    # 28.999999999999996 of 100 steps
    config = ScheduleSection(kind="wsd", decay_frac=0.29)
    assert lr_scale(70, 100, config) == 1.0 > lr_scale(71, 100, config)


@pytest.mark.parametrize("kind, quarter", [("cosine", 0.5 + 0.5**1.5), ("linear", 0.75)])
def test_schedules_end_at_the_asked_share(kind, quarter):
    config = ScheduleSection(kind=kind, warmup_steps=5, final_lr_frac=0.1)
    scale = [lr_scale(step, 45, config) for step in range(45)]
    assert max(scale) == scale[4] == 1.0
    assert scale[14] == pytest.approx(0.1 + 0.9 * quarter)
    assert scale[-1] == pytest.approx(0.1)
    # nor does it rise beyond the end, where a run that is shortened asks for it
    assert lr_scale(64, 45, config) == scale[-1]
    assert all(a >= b for a, b in zip(scale[4:], scale[5:], strict=False))


def test_decay_leaves_out_biases_norms_residuals_and_embedding():
    model = tiny()
    decayed = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if is_decayed(name, module)
    }
    plain = {name for name, _ in model.named_parameters()} - decayed
    assert "model.embeddings.weight" in plain
    assert all(
        name.endswith(("bias", "residual_weight"))
        or "norm" in name
        or name == "model.embeddings.weight"
        for name in plain
    )
    kept = ("bias", "residual_weight")
    assert not any("norm" in name or name.endswith(kept) for name in decayed)
    groups = parameter_groups(model)
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    # a head of its own is decayed, and no matrix of a block
    untied = tiny(tie_word_embeddings=False)
    assert [id(p) for p in parameter_groups(untied)["decay"] if p.ndim == 2] == [
        id(untied.lm_head.weight)
    ]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_optimised_once(name):
    model = tiny()
    settings = {"lr": 0.5, "betas": (0.8, 0.7), "eps": 1e-3}
    config = OptimSection(name=name, weight_decay=0.3, muon_momentum=0.6, **settings)
    optimizers = build_optimizers(model, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    plain = {id(p) for p in parameter_groups(model)["plain"]}
    for group in groups:
        decays = 0.0 if plain & set(map(id, group["params"])) else 0.3
        assert group["weight_decay"] == decays
    *muons, adamw = optimizers
    assert len(muons) == (name == "muon")
    own = {"lr": 0.5, "momentum": 0.6, "adjust_lr_fn": "match_rms_adamw"}
    for optimizer, given in [(adamw, settings), *((muon, own) for muon in muons)]:
        for group in optimizer.param_groups:
            assert group | given == group


def test_meta_init_equals_direct_init_on_one_and_two_ranks(config_file):
    config = RodimusConfig(**CONFIG)
    direct = RodimusForCausalLM(config)
    initialize(direct, template(direct), seed=0)
    expected = {name: p.detach() for name, p in direct.named_parameters()}

    def sharded():
        # whatever state the generator of a rank is in
        torch.manual_seed(os.getpid())
        settings = load_config(config_file)
        ranks = parallel.start(settings.parallel, "cpu")
        with torch.device("meta"):
            model = RodimusForCausalLM(config)
        model = parallel.build_model(model, settings, ranks)
        assert model.lm_head.weight is model.model.embeddings.weight
        return {n: p.full_tensor().detach().numpy() for n, p in model.named_parameters()}

    for world in (1, 2):
        for weights in run_ranks(world, sharded):
            assert weights.keys() == expected.keys()
            for name, value in weights.items():
                assert (value == expected[name].numpy()).all(), name


def test_replicas_start_alike_whatever_their_cpus_draw(config_file, monkeypatch):
    """As the first: one kind of CPU draws other normal numbers than another."""
    config = RodimusConfig(**CONFIG)
    direct = RodimusForCausalLM(config)
    initialize(direct, template(direct), seed=0)
    expected = {name: p.detach() for name, p in direct.named_parameters()}

    def draws_otherwise(seed, name):
        return module_seed(seed, name) + int(os.environ["RANK"]) // 2

    def replicated():
        settings = load_config(config_file, "--parallel.replicate 2 --train.micro-batch 1".split())
        ranks = parallel.start(settings.parallel, "cpu")
        with torch.device("meta"):
            model = RodimusForCausalLM(config)
        model = parallel.build_model(model, settings, ranks)
        return {n: p.full_tensor().detach().numpy() for n, p in model.named_parameters()}

    monkeypatch.setattr("rodimus.train.initialize.module_seed", draws_otherwise)
    for weights in run_ranks(4, replicated):
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            assert (value == expected[name].numpy()).all(), name


def test_seeded_init_follows_the_models_own_rule():
    """Same spread as the model's constructor, every parameter and buffer written."""
    config = RodimusConfig(**{**CONFIG, "d_model": 128, "vocab_size": 2000})
    torch.manual_seed(1)
    usual, seeded = RodimusForCausalLM(config), RodimusForCausalLM(config)
    for tensor in (*seeded.parameters(), *seeded.buffers()):
        tensor.data.fill_(float("nan"))
    initialize(seeded, template(seeded), seed=3)
    for (name, a), b in zip(usual.named_parameters(), seeded.parameters(), strict=True):
        assert torch.isfinite(b).all(), name
        if a.numel() > 500:
            assert b.std().item() == pytest.approx(a.std().item(), rel=0.15, abs=1e-7), name
    for (name, a), b in zip(usual.named_buffers(), seeded.buffers(), strict=True):
        assert torch.equal(a, b), name
    first, second = (layer.mixer.fc.weight for layer in seeded.model.layers)
    assert not torch.equal(first, second)
    again = RodimusForCausalLM(config)
    initialize(again, template(again), seed=4)
    assert not torch.equal(seeded.lm_head.weight, again.lm_head.weight)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["rodimus", "rodimus_plus", "gla", "qwen2"])
def test_flops_equal_torchs_counter(kind, mode):
    """Products with weights, forward, backward and what checkpointing makes again: exactly.

    torch does not look into our operators, so their share is the formulas' alone.
    """
    model = peer(kind) if kind in PEERS else tiny(block_type=kind)
    parallel.checkpoint_activations(model.train(), mode)
    ids, config = torch.randint(0, 300, (2, 64)), model.config
    with FlopCounterMode(display=False) as counter:
        model(ids, position_ids=torch.arange(64).expand(2, -1), **loss_of(ids)).loss.backward()
    products = counter.get_flop_counts()["Global"]
    counted = sum(products.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    useful, again = flops.train_flops(model, config, 64), 0.0
    if mode == "full":
        alone, twice = (
            flops.hardware_flops(model, config, 64, recompute=full) for full in (False, True)
        )
        # of what is made again, a third of everything but products with weights is the operators'
        again = twice - alone - (alone - useful.dense) / 3
    assert counted / ids.numel() == pytest.approx(useful.dense + again, rel=1e-12)


def test_hfu_counts_chunks_and_recomputation():
    """Rodimus+ 1.6B by hand: 3 L (2 C n + 2 C D) beyond the recurrence; 8/6 less head and end."""
    config = RodimusConfig(**json.loads(_released("rodimus_plus_1b6")))
    with torch.device("meta"):
        model = RodimusForCausalLM(config)
    useful = flops.train_flops(model, config, 4096).total
    spent = flops.hardware_flops(model, config, 4096, recompute=False)
    chunks = 3 * 24 * (2 * 64 * 64 + 2 * 64 * 4096)
    assert spent - useful == chunks
    head, end = 126464 * 2048, 24 * 2736 * 2048
    full = flops.hardware_flops(model, config, 4096, recompute=True)
    assert full == pytest.approx(spent * 4 / 3 - 2 * head - 2 * end)


def test_flops_of_the_released_models():
    """Hand-computed from the shapes: 6 N + 12 L n D + 12 L d w + 24 L D, in operations a token."""
    with torch.device("meta"):
        config = RodimusConfig(**json.loads(_released("rodimus_plus_1b6")))
        model = RodimusForCausalLM(config)
    part = flops.train_flops(model, config, 4096)
    assert part.dense / 1e9 == pytest.approx(9.637, abs=1e-3)
    assert part.recurrence == 12 * 24 * 64 * 4096
    assert part.attention / 1e9 == pytest.approx(0.906, abs=1e-3)
    assert part.convolution == 24 * 24 * 4096
    assert part.total / 1e9 == pytest.approx(10.62, abs=5e-3)


def test_a_gla_has_a_state_for_each_head():
    """By hand: 12 L H (d / 2 H) (d / H), in two layers with two heads and 64 channels; in chunks
    3 L (2 C d / 2 + 2 C d) more."""
    model = peer("gla")
    useful = flops.train_flops(model, model.config, 64)
    assert useful.recurrence == 12 * 2 * 2 * 16 * 32
    spent = flops.hardware_flops(model, model.config, 64, recompute=False)
    assert spent - useful.total == 3 * 2 * (2 * 64 * 32 + 2 * 64 * 64)


def _released(name):
    return (Path(__file__).parents[2] / f"configs/model/{name}.json").read_text()


def test_visible_keys_is_the_mean_over_positions():
    for seq_len, window in [(10, 4), (4, 10), (7, 7)]:
        mean = np.mean([min(t, window) for t in range(1, seq_len + 1)])
        assert flops.visible_keys(seq_len, window) == pytest.approx(mean)


def test_guard_tells_a_spike_from_a_falling_loss():
    guard = Guard(GuardSection(spike_sigma=6.0))
    rng = np.random.default_rng(0)
    for step in range(500):
        assert guard.judge(step, 8 * 0.99**step + 2 + 0.05 * rng.normal(), 1.0) == "ok"
    assert guard.judge(500, 6.0, 1.0) == "skip"
    resumed = Guard(GuardSection(spike_sigma=6.0), guard.state())
    assert resumed.judge(501, 6.0, 1.0) == "skip"
    with pytest.raises(RunStopped, match="step 502: loss 6.0000 is above"):
        resumed.judge(502, 6.0, 1.0)


@pytest.mark.parametrize("on_spike", ["skip", "rollback", "stop"])
@pytest.mark.parametrize("figures", [(math.nan, 1.0), (2.0, math.inf)], ids=["loss", "gradient"])
def test_guard_skips_what_is_no_number_and_counts_bad_steps_in_a_row(on_spike, figures):
    """Whatever a spike would lead to."""
    guard = Guard(GuardSection(max_bad_steps=3, on_spike=on_spike))
    for step in range(9):
        is_good = step % 3 == 2
        verdict = guard.judge(step, *((2.0, 1.0) if is_good else figures))
        assert verdict == ("ok" if is_good else "skip")


@pytest.mark.parametrize("good, verdict", [(49, "ok"), (50, "skip")])
def test_guard_knows_what_is_usual_from_the_first_fifty_losses(good, verdict):
    """All alike, so that a rise of 10% is ten deviations."""
    guard = Guard(GuardSection())
    for step in range(good):
        guard.judge(step, 2.0, 1.0)
    assert guard.judge(good, 2.2, 1.0) == verdict


@pytest.mark.parametrize("sigma, loss", [(6.0, 2.1), (0.0, 1e3)])
def test_guard_lets_pass_a_small_rise_and_where_asked_any(sigma, loss):
    guard = Guard(GuardSection(spike_sigma=sigma))
    for step in range(100):
        guard.judge(step, 2.0, 1.0)
    assert guard.judge(100, loss, 1.0) == "ok"


def test_guard_stops_at_once_where_asked():
    guard = Guard(GuardSection(on_spike="stop"))
    for step in range(100):
        guard.judge(step, 2.0, 1.0)
    with pytest.raises(RunStopped):
        guard.judge(100, 9.0, 1.0)
