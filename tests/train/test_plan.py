"""`rodimus plan` and `rodimus plot`: figures that can be checked by hand, and readable failures."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rodimus import cli
from rodimus.errors import InputError
from rodimus.train import parallel, plan, plot
from rodimus.train.config import ParallelSection
from rodimus.train.load import load_config
from rodimus.train.loop import Trainer
from rodimus.train.metrics import peak_flops
from tests.train.ranks import run_ranks

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "configs" / "train"


def planned(name, gpus, *overrides, mfu=0.5, gpu="H100"):
    config = load_config(TRAIN / f"{name}.toml", list(overrides))
    return plan.make_plan(config, gpus, mfu=mfu, gpu=gpu)


def test_plan_of_the_released_plus_model():
    """By hand: 989e12 * 0.5 / 10.621e9 operations a token; 6 P 7/8 bytes; 16 P / 8 bytes."""
    got = planned("rodimus_plus_1b6", 8)
    assert got.parameters == 1_607_095_296
    assert got.tokens_per_s / 8 == pytest.approx(46_560, rel=1e-3)
    assert got.days == pytest.approx(31.1, abs=0.05)
    sharded = [got.memory[k] for k in ("weights, fp32", "gradients, fp32", "optimizer")]
    assert sum(sharded) == pytest.approx(16 * 1_607_095_296 / 8)
    assert got.traffic["inside a replica, per micro-step"] == pytest.approx(8.437e9, rel=1e-3)
    assert got.traffic["between replicas, per step"] == 0


def test_a_plan_of_a_small_model_has_small_units():
    """By hand: 4 and 12 x 171,520 bytes; 40 x 1,024 tokens; 40,960 / 446.7e6 a second."""
    text = plan.render(planned("ci_tiny", 1), 0.5)
    assert "weights, fp32                     0.69 MB" in text
    assert "2.1 MB each, at most 4 at once: 8.2 MB" in text
    assert "1.107 MFLOP (dense 1.014  " in text and "40 steps, 41.0 k tokens" in text
    assert text.endswith("0.0 seconds")
    large = plan.render(planned("rodimus_plus_1b6", 64), 0.5)
    assert "memory of one GPU     53.44 GB\n  weights, fp32                     0.10 GB" in large
    assert "10.621 GFLOP" in large and large.endswith("3.9 days")


def test_operations_that_are_made_again_take_their_part_of_the_peak():
    """By hand, in GFLOP: (10.621 + 0.038 in chunks) / 3 without 0.518 of the head and 0.269 of the
    products that end blocks."""
    plain, same, full = (
        planned("rodimus_plus_1b6", 8, "--train.ac", mode) for mode in ("none", "selective", "full")
    )
    assert plain.recomputed == same.recomputed == 0
    assert full.recomputed == pytest.approx(2.766e9, rel=1e-3)
    assert full.flops == plain.flops
    assert full.tokens_per_s / plain.tokens_per_s == pytest.approx(10.621 / 13.387, rel=1e-3)
    assert "at 50% MFU" in plan.render(plain, 0.5)
    assert "at 40% MFU" in plan.render(full, 0.5)


def test_ranks_that_share_rows_share_activations_and_send_states_and_windows():
    """By hand: 7 states of 64 x (4096 + 1) fp32; 3 tokens of 4096, 2048 of 17 x 128, in bf16."""
    long = ("--data.seq-len", "65536", "--train.global-batch-tokens", str(2**21))
    long += ("--train.micro-batch", "1")
    whole = planned("rodimus_plus_1b6", 8, *long)
    split = planned("rodimus_plus_1b6", 8, *long, "--parallel.context-parallel", "8")
    activations = "activations (estimate)"
    assert split.memory[activations] == whole.memory[activations] / 8
    sent = 7 * 4 * 64 * 4097 + 2 * 3 * 4096 + 2 * 2048 * 17 * 128
    assert split.traffic["between pieces, per micro-step"] == 2 * 24 * sent
    assert split.tokens_per_s == whole.tokens_per_s


def test_rows_of_a_peer_cannot_be_cut():
    with pytest.raises(InputError, match="context_parallel is for Rodimus, not for qwen2"):
        planned("qwen2_340m", 8, "--parallel.context-parallel", "2")


def test_recurrent_model_needs_no_attention():
    got = planned("rodimus_1b4", 64, "--parallel.replicate", "8", mfu=0.4)
    assert got.flops.attention == 0
    assert got.tokens_per_s / 64 == pytest.approx(42_400, rel=2e-3)
    assert got.traffic["between replicas, per step"] == pytest.approx(
        2 * 7 / 8 * 4 * 1.5316e9 / 8, rel=1e-3
    )


def test_peers_are_planned_too():
    """The same parameters and settings; attention over the whole row costs Qwen2 the most."""
    ours, gla, qwen2 = (planned(f"{n}_340m", 8) for n in ("rodimus_plus", "gla", "qwen2"))
    assert gla.memory["optimizer"] == pytest.approx(ours.memory["optimizer"], rel=1e-3)
    assert (gla.flops.attention, qwen2.flops.recurrence) == (0, 0)
    # by hand: 12 L d T / 2
    assert qwen2.flops.attention == pytest.approx(12 * 24 * 1024 * 2048, rel=1e-3)
    assert gla.tokens_per_s > ours.tokens_per_s > qwen2.tokens_per_s
    for plan_ in (ours, gla, qwen2):
        assert 5e9 < plan_.memory["activations (estimate)"] < 50e9


def test_checkpointing_activations_saves_memory():
    sizes = [
        planned("rodimus_plus_1b6", 8, "--train.ac", mode).memory["activations (estimate)"]
        for mode in ("none", "selective", "full")
    ]
    assert sizes[0] > 1.3 * sizes[1] > 2 * sizes[2] > 0


def test_backward_has_one_block_whole():
    """By hand: of 4 x 4096 tokens the stream of 2048, fp32, before each of the 23 others."""
    whole, of_streams = (
        planned("rodimus_plus_1b6", 8, "--train.ac", mode).memory["activations (estimate)"]
        for mode in ("none", "full")
    )
    assert of_streams == pytest.approx(4 * 4096 * 2048 * 4 * 23 + whole / 24)


def test_muon_keeps_one_moment_of_the_matrices():
    adamw = planned("rodimus_plus_1b6", 8).memory["optimizer"]
    assert (
        adamw / 2
        < planned("rodimus_plus_1b6", 8, "--optim.name", "muon").memory["optimizer"]
        < adamw
    )


def test_muon_sends_each_matrix_once_and_back():
    """By hand: 2 of bf16 there and 2 back, of the share of a rank all but what is its own."""
    own = [planned("rodimus_plus_1b6", 8, "--optim.name", name) for name in ("adamw", "muon")]
    # of the 8 bytes of two moments a matrix has but one
    matrices = 8 * (own[0].memory["optimizer"] - own[1].memory["optimizer"]) / 4
    assert own[1].traffic["of Muon, per step"] == pytest.approx(4 * matrices / 8 * 7 / 8)
    assert 1.3e9 < matrices < 1.4e9 and "of Muon, per step" not in own[0].traffic
    alone = planned("rodimus_plus_1b6", 1, "--optim.name", "muon")
    assert alone.traffic["of Muon, per step"] == 0


def test_muon_sends_what_is_planned(config_file):
    def sent_and_planned():
        config = load_config(config_file, ["--optim.name", "muon"])
        trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
        exchange, sent = dist.all_to_all_single, []

        def counted(out, given, out_sizes, sizes, group):
            to_others = sum(sizes) - sizes[dist.get_rank()]
            sent.append(to_others * given.element_size())
            return exchange(out, given, out_sizes, sizes, group=group)

        dist.all_to_all_single = counted
        trainer.step()
        return sum(sent), plan.make_plan(config, 2, mfu=0.5).traffic["of Muon, per step"]

    for sent, planned in run_ranks(2, sent_and_planned):
        assert sent == planned > 0


def test_checkpoints_on_disk_are_planned():
    """By hand: 12 bytes a parameter; the newest three, and the next while it is written."""
    got = planned("rodimus_plus_1b6", 8, "--checkpoint.keep-every", "0")
    assert (got.checkpoint, got.checkpoints) == (12 * 1_607_095_296, 4)
    assert "19.3 GB each, at most 4 at once: 77.1 GB" in plan.render(got, 0.5)
    one = ("--checkpoint.keep", "1", "--train.tokens", "0", "--train.steps", "10000")
    one += ("--checkpoint.every", "400", "--checkpoint.keep-every", "1000")
    # 2000, 4000, ...
    assert planned("rodimus_plus_1b6", 8, *one).checkpoints == 2 + 5


def test_auto_resharding_is_planned_as_it_is_trained():
    """4B in bf16 is more than a tenth of an H100, and less of an H200."""
    setting = "--parallel.reshard-after-forward"
    for gpu, chosen in (("H100", "true"), ("H200", "false")):
        auto, other = (planned("rodimus_plus_4b", 8, setting, x, gpu=gpu) for x in ("auto", chosen))
        assert (auto.memory, auto.traffic) == (other.memory, other.traffic)
    keeps, gives_back = (
        planned("rodimus_plus_4b", 8, setting, x).memory["gathered weights, bf16"]
        for x in ("false", "true")
    )
    assert gives_back < keeps / 4
    assert not parallel.reshards(ParallelSection(), 10**12, parallel._memory(torch.device("cpu")))


def test_blocks_that_are_given_back_are_gathered_twice():
    """By hand: bf16 weights of the blocks once more, not the tied embedding and the last norm."""
    setting = "--parallel.reshard-after-forward"
    plans = [planned("rodimus_plus_1b6", 8, setting, x) for x in ("false", "true")]
    kept, given_back = (plan_.traffic["inside a replica, per micro-step"] for plan_ in plans)
    blocks = 1_607_095_296 - 126464 * 2048 - 2048
    assert kept == 6 * 1_607_095_296 * 7 / 8
    assert given_back - kept == 2 * blocks * 7 / 8


def test_mfu_counts_with_the_peak_of_that_device(monkeypatch):
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA L40S": None,
        "NVIDIA RTX A1000 Laptop GPU": None,
    }
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak, name


def test_page_is_that_of_the_script():
    page = runpy.run_path(str(ROOT / "scripts" / "scaling.py"))["page"]()
    assert (ROOT / "docs" / "scaling.md").read_text() == page


def test_plan_command_says_that_it_takes_settings(capsys):
    assert cli.main(["plan", "--help"]) == 0
    assert "--section.key VALUE" in capsys.readouterr().out


def test_plan_command_prints_or_fails_in_one_line(capsys):
    path = str(TRAIN / "rodimus_plus_130m.toml")
    assert cli.main(["plan", path, "--gpus", "8"]) == 0
    told = capsys.readouterr().out
    assert "131,477,120" in told and "float32 takes more" not in told
    assert cli.main(["plan", path, "--train.dtype", "float32"]) == 0
    assert "bfloat16; train.dtype = float32 takes more" in capsys.readouterr().out
    refused = [["--gpus", "7"], ["--gpus", "0"], ["--mfu", "0"], ["--mfu", "50"]]
    for wrong in (*refused, ["--optim.lrr", "1"]):
        assert cli.main(["plan", path, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def run(tmp_path):
    rows = [{"step": s, "loss": 5 - s / 50, "lr": 1e-3} for s in range(1, 101)]
    rows[60] = {**rows[60], "val_loss": 3.9, "tokens_per_s": 100.0}
    text = "".join(json.dumps(r) + "\n" for r in [*rows, {"step": 100, "loss": 2.5}])
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 101, "lo')
    return tmp_path


def test_lines_that_are_no_records_are_left_out_of_a_plot(run):
    before = plot.read_metrics(run)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\n3\n[]\n{"loss": 1}\n{"step": "x"}\n\xff\xfe\n{"step": 7, "loss": {}}\n')
    assert plot.read_metrics(run) == before


def test_metrics_of_a_resumed_run_are_read_once_a_step(run):
    rows = plot.read_metrics(run)
    assert [r["step"] for r in rows] == list(range(1, 101))
    assert rows[-1] == {"step": 100, "loss": 2.5}


def test_a_branch_that_was_left_is_not_in_a_plot(tmp_path):
    """A run of ten steps that went on from its fourth, and from no further than its seventh."""
    old = [{"step": step, "loss": 1.0} for step in range(1, 11)]
    old.append({"step": 10, "val_loss": 1.5})
    new = [{"step": 5, "loss": None}, *({"step": step, "loss": 2.0} for step in (6, 7))]
    new.append({"step": 7, "val_loss": 2.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old + new))
    kept = [{"step": 5}, {"step": 6, "loss": 2.0}, {"step": 7, "loss": 2.0, "val_loss": 2.5}]
    assert plot.read_metrics(tmp_path) == old[:4] + kept


@pytest.mark.filterwarnings("error")
def test_a_run_without_a_finite_loss_is_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "lr": 1e-3}\n')
    assert plot.plot(tmp_path).is_file()


def test_plot_writes_a_png(run, capsys):
    assert cli.main(["plot", str(run)]) == 0
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for path in (run / "none" / "x.png", run / "x.unknown"):
        capsys.readouterr()
        assert cli.main(["plot", str(run), "--out", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"rodimus: error: cannot write {path}: ")
        assert error.count("\n") == 1
    for path in (run / "none", "x" * 300):
        assert cli.main(["plot", str(path)]) == 2
    with pytest.raises(InputError, match="expected the folder of a training run"):
        plot.read_metrics(run / "none")
