"""The tasks ask what they say, the ablation changes the gate alone, and the harness can learn."""

import math

import pytest
import torch

import rodimus
from benchmarks import records
from benchmarks.quality import __main__ as command
from benchmarks.quality import learn, networks, protocols, tasks
from rodimus.modeling_rodimus import NO_PADDING

CPU = torch.device("cpu")
SHAPE = networks.Shape(vocab=64, width=32, mem_size=8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("random_fill", [True, False])
def test_recall_asks_for_the_value_that_followed_each_key(random_fill):
    ids, targets = tasks.mqar(32, 64, 8, 64, generator(), random_fill=random_fill)
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8 and len(set(pairs.values())) == 8
        where = [t for t, target in enumerate(asked) if target != tasks.IGNORED]
        assert {row[t]: asked[t] for t in where} == pairs
        assert all(t >= 16 and t % 2 == 0 for t in where)
        assert all(0 < key < 32 <= value for key, value in pairs.items())


def test_gaps_before_a_return_follow_the_power_law():
    ids, targets = tasks.mqar(4000, 68, 1, 64, generator())
    gaps = ((targets != tasks.IGNORED).long().argmax(1) - 2) // 2
    density = torch.arange(1, 34, dtype=torch.float64) ** (0.01 - 1)
    expected = density / density.sum()
    counted = torch.bincount(gaps, minlength=33).double() / 4000
    assert (counted - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)
    assert counted[0] > 5 * counted[10]


def test_too_many_pairs_are_refused():
    with pytest.raises(ValueError, match=r"pairs must be 1 \.\. 4 for length 16"):
        tasks.mqar(1, 16, 5, 64, generator())


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 14), (1.0, 29)])
def test_passkey_lies_at_its_depth_and_is_asked_for_last(depth, place):
    ids, targets = tasks.passkey(8, 32, depth, 64, generator())
    assert (ids[:, place] == ids[:, -1]).all() and (ids[:, place + 1] == targets[:, -1]).all()
    assert (targets[:, :-1] == tasks.IGNORED).all()
    others = torch.cat((ids[:, :place], ids[:, place + 2 : -1]), dim=1)
    assert others.max() < 32 <= ids[:, place].min() and targets[:, -1].min() >= 48


def test_same_seed_same_batch():
    first, second = (tasks.mqar(4, 32, 4, 64, generator(3)) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sources_are_split_by_file_and_ask_for_the_next_byte():
    train, val = (tasks.python_sources(share, most=2**18) for share in ("train", "val"))
    assert train.numel() == 2**18 and 0 < val.numel() <= 2**18
    assert bytes(train[:2000].tolist()) not in bytes(val.tolist())
    assert not any("encodings" in path.parts for path in tasks._library_files())
    ids, targets = tasks.language(train, 4, 32, generator())
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    with pytest.raises(ValueError, match="share must be"):
        tasks.python_sources("test")


def test_gates_have_the_same_parameters_to_the_last_tensor():
    def signature(gate):
        torch.manual_seed(0)
        network = networks.build(gate, SHAPE)
        return [(name, p.shape, p.sum().item()) for name, p in network.named_parameters()]

    first, *others = map(signature, networks.GATES)
    assert all(other == first for other in others)
    assert len({networks.state_bytes(gate, SHAPE, 99) for gate in networks.GATES}) == 1


@pytest.mark.parametrize("gate", networks.GATES)
def test_no_gate_grows_the_state(gate):
    raw = torch.tensor([-100.0, -5.0, 0.0, 5.0, 100.0]).expand(1, 1, 5)
    k, log_decay = networks.gate(gate, raw, raw, raw, torch.zeros(1))
    assert k.shape == log_decay.shape == raw.shape
    assert (log_decay <= 0).all() and log_decay.isfinite().all() and k.isfinite().all()


@pytest.mark.parametrize("gate", networks.GATES)
def test_every_gate_writes_keys_whose_length_does_not_follow_the_projection(gate):
    k, select, temper = (torch.randn(2, 5, 8, generator=generator(seed)) for seed in range(3))
    expected, _ = networks.gate(gate, k, select, temper, torch.zeros(1))
    longer, _ = networks.gate(gate, 7 * k, select, temper, torch.zeros(1))
    torch.testing.assert_close(longer, expected)


@torch.no_grad()
def test_the_rodimus_gate_makes_the_models_own_mixer():
    config = rodimus.RodimusConfig(d_model=32, n_layer=1, vocab_size=64, mixer_cfg={"mem_size": 8})
    theirs = rodimus.RodimusForCausalLM(config).model.layers[0].mixer.eval()
    ours = networks.GatedMixer(SHAPE, "rodimus")
    inner = theirs.inner_mixer
    names = {
        "fc.weight": theirs.fc.weight,
        "conv.weight": inner.short_conv["conv1d"].weight,
        "conv.bias": inner.short_conv["conv1d"].bias,
        "in_proj.weight": inner.in_proj.weight,
        "mem_gate.weight": inner.mem_gate_proj.weight,
        "mem_gate.bias": inner.mem_gate_proj.bias,
        "value_gate.0.weight": inner.ch_gate_proj[0].weight,
        "value_gate.1.weight": inner.ch_gate_proj[1].weight,
        "value_gate.1.bias": inner.ch_gate_proj[1].bias,
        "log_rate": ours.log_rate,
        "residual_weight": inner.residual_weight,
        "norm_weight": theirs.act_norm.weight,
        "out_proj.weight": theirs.out_proj.weight,
    }
    ours.load_state_dict(names)
    x = torch.randn(2, 40, 32)
    expected = theirs(x, NO_PADDING)
    assert (ours(x) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("variant", networks.VARIANTS)
def test_every_variant_trains(variant):
    task = learn.mqar_task(64, ((16, 2),), ((16, 2), (32, 2)), batch=4, test_batch=4)
    budget = learn.Budget(2, (1e-3,))
    found = learn.run(variant, SHAPE, task, budget, 1e-3, 0, CPU)
    assert set(found["scores"]) == set(found["choosing"]) == {"16/2", "32/2"}
    row = learn.row(variant, SHAPE, task, budget, {"0.001": [found]})
    assert row["parameters"] > 0 and row["state_bytes"] > 0


def test_the_learning_rate_is_chosen_over_all_tests_by_draws_that_are_not_reported():
    """The first test ties and what is reported would mislead."""
    choosing = {3e-4: (1.0, 0.5), 1e-3: (1.0, 0.9), 3e-3: (1.0, 0.7)}
    runs = {
        f"{rate:g}": [
            {
                "seed": seed,
                "choosing": {"a": first, "b": second},
                "scores": {"a": first, "b": 1 - second},
                "parameters": 1,
            }
            for seed in (0, 1)
        ]
        for rate, (first, second) in choosing.items()
    }
    budget = learn.Budget(1, tuple(choosing), seeds=(0, 1))
    for score, best in (("accuracy", 1e-3), ("bits", 3e-4)):
        task = learn.Task(None, {"a": None, "b": None}, score, 8)
        row = learn.row("rodimus", SHAPE, task, budget, runs)
        assert row["lr"] == best and row["scores"]["b"] == [1 - choosing[best][1]] * 2
        assert row["sweep"] == runs


def test_the_two_draws_of_a_test_differ(monkeypatch):
    drawn = []

    def draw(generator):
        drawn.append(tasks.mqar(8, 16, 2, 64, generator))
        return drawn[-1]

    task = learn.mqar_task(64, ((16, 2),), ((16, 2),), batch=4)._replace(tests={"a": draw})
    for seed in (0, 1):
        learn.run("none", SHAPE, task, learn.Budget(1, (1e-3,)), 1e-3, seed, CPU)
    reported, choosing, again, _ = (batch.ids for batch in drawn)
    assert not torch.equal(reported, choosing) and torch.equal(reported, again)


def test_only_the_learning_rate_moves_in_training(monkeypatch):
    seen = []

    class AdamW(torch.optim.AdamW):
        def step(self, *arguments):
            seen.append((self.param_groups[0]["lr"], self.param_groups[0]["betas"]))
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    task = learn.mqar_task(64, ((16, 2),), ((16, 2),), batch=4, test_batch=4)
    learn.run("none", SHAPE, task, learn.Budget(20, (1e-2,)), 1e-2, 0, CPU)
    rates, betas = zip(*seen, strict=True)
    assert len(seen) == 20 and max(rates) == pytest.approx(1e-2) and rates[-1] < 1e-4
    assert set(betas) == {(0.9, 0.999)}


def test_every_length_of_a_language_test_reads_the_same_text():
    task = learn.language_task(32, 4, (32, 128), windows=8)
    short, long = (draw(generator()) for draw in task.tests.values())
    assert short.ids.shape == (32, 32) and long.ids.shape == (8, 128)
    for name in ("ids", "targets"):
        assert torch.equal(getattr(short, name).flatten(), getattr(long, name).flatten())


def test_a_run_is_repeated_to_the_bit():
    task = learn.mqar_task(64, ((16, 2),), ((16, 2),), batch=4, test_batch=16)
    budget = learn.Budget(3, (1e-2,))
    first, second = (
        learn.run("rodimus", SHAPE, task, budget, 1e-2, 0, CPU)["scores"] for _ in "ab"
    )
    assert first == second


def fake_run(seed, score, seconds=0.0):
    scores = {"scores": {"a": score}, "choosing": {"a": score}}
    return {"seed": seed, **scores, "parameters": 1, "seconds": seconds}


def test_the_best_rate_of_a_sweep_gets_the_other_seeds(tmp_path, monkeypatch):
    trained = []

    def run(variant, shape, task, budget, rate, seed, device):
        trained.append((rate, seed))
        return fake_run(seed, 1.0 if rate == 1e-2 else 0.5)

    monkeypatch.setattr(learn, "run", run)
    task = learn.Task(None, {"a": None}, "accuracy", 8)
    budget = learn.Budget(1, (1e-3, 10**-2.5, 1e-2), seeds=(0, 1, 2), sweep_seeds=1)
    case = protocols.Case("mqar-x", SHAPE, task, budget, ("rodimus",), "")
    assert command.run_case(case, tmp_path, CPU, float("inf"))
    assert trained == [(1e-3, 0), (10**-2.5, 0), (1e-2, 0), (1e-2, 1), (1e-2, 2)]
    ((row,),) = (record["rows"] for record in records.read(tmp_path))
    assert row["lr"] == 1e-2 and row["scores"]["a"] == [1.0] * 3
    # a seed that only the best rate has does not speak for it
    row["sweep"]["0.01"][1]["choosing"]["a"] = 0.0
    assert learn.best_rate(task, budget, row["sweep"]) == 1e-2
    missing = {**row["sweep"], "0.01": row["sweep"]["0.01"][:1]}
    found = learn.row("rodimus", SHAPE, task, budget, missing)
    assert found["reason"] == "3 of 5 runs trained"


def test_a_call_continues_what_lies_in_another_folder_and_ends_in_time(tmp_path, monkeypatch):
    clock, trained = [0.0], []

    def run(variant, shape, task, budget, rate, seed, device):
        trained.append(rate)
        clock[0] += 100.0
        return fake_run(seed, 1.0, seconds=100.0)

    monkeypatch.setattr(learn, "run", run)
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("RODIMUS_BENCH_COMMIT", "same")
    task = learn.Task(None, {"a": None}, "accuracy", 8)
    budget = learn.Budget(1, (1e-3, 3e-3, 1e-2))
    case = protocols.Case("mqar-x", SHAPE, task, budget, ("rodimus",), "")
    first, second = tmp_path / "first", tmp_path / "second"
    # a third would end at 300
    assert not command.run_case(case, first, CPU, 250.0)
    assert trained == [1e-3, 3e-3]
    assert command.run_case(case, second, CPU, 350.0, first)
    assert trained == [1e-3, 3e-3, 1e-2]
    (record,) = records.read(second)
    assert [row["status"] for row in record["rows"]] == ["measured"]


def test_the_protocol_of_a_gpu_runs_whole_in_two_calls_of_a_small_one(
    tmp_path, capsys, monkeypatch
):
    """The same cases, sweep and seeds; only widths and steps are small."""
    monkeypatch.setenv("RODIMUS_BENCH_COMMIT", "same")
    cases = list(protocols.cases("mqar", "tiny"))
    wanted = {case.name.replace("gpu", "tiny") for case in protocols.cases("mqar", "gpu")}
    assert {case.name for case in cases} == wanted
    command_line = ["mqar", "--size", "tiny", "--cases", "mqar-tiny-attention"]
    command_line += ["--out", str(tmp_path)]
    assert command.main([*command_line, "--seconds", "0"]) == 3
    assert "run the same command again" in capsys.readouterr().out
    run, trained = learn.run, []
    monkeypatch.setattr(learn, "run", lambda *args: trained.append(args[4:6]) or run(*args))
    assert command.main([*command_line]) == 0
    assert len(trained) == 6 and {seed for _, seed in trained} == {0, 1, 2}
    assert command.main([*command_line]) == 0 and len(trained) == 6
    (record,) = records.read(tmp_path)
    ((row,), tests) = record["rows"], cases[0].task.tests
    assert row["status"] == "measured" and set(row["scores"]) == set(tests)
    assert all(len(scores) == 3 for scores in row["scores"].values())
    assert protocols.HARDEST_RECALL in row["scores"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--cases", "mqar-cpu-n17"], "--cases knows mqar-cpu-n16, not mqar-cpu-n17"),
        (["--size", "tiny"], "--out names a folder"),
    ],
)
def test_the_command_says_what_it_expected(capsys, more, told):
    with pytest.raises(SystemExit):
        command.main(["mqar", *more])
    assert told in capsys.readouterr().err


def test_an_interrupted_case_is_continued(tmp_path, monkeypatch):
    trained = []

    def run(variant, shape, task, budget, rate, seed, device):
        trained.append((variant, rate, seed))
        clock.append(0.0)
        return fake_run(seed, 1.0)

    clock = []
    monkeypatch.setattr(learn, "run", run)
    monkeypatch.setattr(command.time, "monotonic", lambda: float(len(clock)))
    monkeypatch.setenv("RODIMUS_BENCH_COMMIT", "same")
    task = learn.Task(None, {"a": None}, "accuracy", 8)
    budget = learn.Budget(1, (1e-3, 1e-2), seeds=(0, 1))
    case = protocols.Case("mqar-x", SHAPE, task, budget, ("a", "b"), "")

    assert not command.run_case(case, tmp_path, CPU, 2.0)
    wanted = [(v, rate, seed) for v in "ab" for rate in (1e-3, 1e-2) for seed in (0, 1)]
    assert trained == wanted[:3]
    (record,) = records.read(tmp_path)
    assert [row.get("reason") for row in record["rows"]] == ["3 of 4 runs trained"]

    assert command.run_case(case, tmp_path, CPU, float("inf"))
    assert trained == wanted
    (record,) = records.read(tmp_path)
    assert [(row["target"], row["status"]) for row in record["rows"]] == [
        ("a", "measured"),
        ("b", "measured"),
    ]
    assert command.run_case(case, tmp_path, CPU, 0.0)

    longer = case._replace(budget=budget._replace(steps=2))
    assert command.run_case(longer, tmp_path, CPU, float("inf"))
    assert trained == wanted * 2
    about = command.machine.describe(CPU) | {"name": "another machine"}
    monkeypatch.setattr(command.machine, "describe", lambda device: about)
    assert command.run_case(longer, tmp_path, CPU, float("inf"))
    assert trained == wanted * 3


@pytest.mark.parametrize("experiment", protocols.EXPERIMENTS)
@pytest.mark.parametrize("size", protocols.SIZES)
def test_protocols_treat_every_variant_alike(experiment, size):
    cases = list(protocols.cases(experiment, size))
    for case in cases:
        assert case.task is cases[0].task and case.budget == cases[0].budget
        assert len(case.budget.rates) >= 3, "the best learning rate can have neighbours"
        assert len(case.budget.seeds) >= 3
        variants = {"attention"} if "attention" in case.name else set(networks.GATES)
        assert variants <= set(case.variants)
        batch = case.task.train(0, generator())
        assert batch.ids.max() < case.shape.vocab


def test_recall_on_a_gpu_has_the_amounts_of_zoology():
    cases = list(protocols.cases("mqar", "gpu"))
    expanded = [case.shape.mem_size for case in cases if "rodimus" in case.variants]
    assert sorted(expanded) == [16, 32, 64, 128, 256] and len(cases) == 6
    # without MLP, or as models
    assert {v for case in cases for v in case.variants} == set(networks.VARIANTS)
    case = cases[0]
    assert protocols.HARDEST_RECALL in case.task.tests
    batches = [case.task.train(step, generator()) for step in range(9)]
    assert [batch.ids.shape[1] for batch in batches] == [64] * 5 + [128] + [256] * 3
    # 180,000 examples 32 times
    assert case.budget.steps * batches[0].ids.shape[0] == 180_000 * 32
    assert case.budget.rates[-1] == pytest.approx(10**-1.5)


def test_the_harness_learns_the_easy_case():
    """Passkeys in 8 tokens: all are found, also in rows four times as long as any seen."""
    task = learn.passkey_task(32, (8,), (16, 32), batch=32)
    shape = networks.Shape(vocab=32, width=32, mem_size=8, layers=1)
    budget = learn.Budget(200, (1e-2,))
    scores = learn.run("rodimus", shape, task, budget, 1e-2, 0, CPU)["scores"]
    assert scores["16"] >= 0.95 and scores["32"] >= 0.9
