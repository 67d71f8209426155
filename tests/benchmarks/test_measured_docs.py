"""Measured tables in docs/: what the committed records say, rounded.

A table stands below ``<!-- measured: NAME -->``. ``TABLES`` computes its rows from the records of
``benchmarks/results/NVIDIA_H200``, or of the CPU beside it, and a failing test prints them.
"""

import json
import re
from pathlib import Path
from statistics import median

import pytest

from benchmarks import bench_attention, harness

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results" / "NVIDIA_H200"
CPU = RESULTS.parent / "AMD_EPYC"
CPU_CONTEXTS = ("t128", "t1024", "t4096", "t16384")
MARKER = re.compile(r"<!-- measured: (\S+) -->\n((?:\|.*\n)+)")

LAYERS = 24
SHAPES = {"b8-t4096": "8 x 4,096 tokens", "b1-t32768": "1 x 32,768 tokens"}
PASSES = {"forward": "forward", "training": "forward and backward"}
DECODE = (("b1", "t1024"), ("b1", "t4096"), ("b1", "t32768"), ("b1", "t131072"), ("b8", "t4096"))
DECODE += (("b64", "t1024"), ("b256", "t1024"))


def record(name, folder=RESULTS):
    """A record by the name of its file."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def measured(name, folder=RESULTS):
    """Measured rows of a record by target."""
    rows = record(name, folder)["rows"]
    return {row["target"]: row for row in rows if row["status"] == "measured"}


def line(*cells):
    return ("| " + " | ".join(cells) + " |").replace("|  |", "| |")


def us(milliseconds):
    value = milliseconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def percent(share):
    return f"{share:.0%}"


def megabytes(count):
    return f"{count / 1e6:,.0f}"


def ddts():
    for what, title in PASSES.items():
        for shape, tokens in SHAPES.items():
            rows = measured(f"ddts-{what}-{shape}-bfloat16-v4096")
            ours, peer = rows["ddts/triton_chunk"], rows["chunk_gla/fla"]
            ratio = peer["median_ms"] / ours["median_ms"]
            times = us(ours["floor_ms"]), us(ours["median_ms"]), percent(ours["floor_share"])
            yield line(f"{title}, {tokens}", *times, us(peer["median_ms"]), f"{ratio:.2f}")


def surroundings():
    rows = measured("ddts-surroundings-b8-t4096-bfloat16-v4096")
    names = [row["family"] for row in rows.values() if row["engine"] == "triton"]
    for name in names:
        ours, torch = rows[f"{name}/triton"], rows[f"{name}/reference"]
        times = us(ours["floor_ms"]), us(ours["median_ms"]), us(torch["median_ms"])
        yield line(f"`{name}`", *times)
    total = lambda key, engine: us(sum(rows[f"{name}/{engine}"][key] for name in names))
    floor, ours = total("floor_ms", "triton"), total("median_ms", "triton")
    yield line("together", floor, ours, total("median_ms", "reference"))


def steps():
    """One token in one layer, by form."""
    for batch in (1, 256):
        rows = measured(f"ddts-step-b{batch}-t1-bfloat16-v4096")
        forms = [rows[f"ddts_step/{form}"] for form in ("native", "triton")]
        times = [us(row["median_ms"]) for row in forms]
        yield line(f"`ddts_step`, {batch}", us(forms[0]["floor_ms"]), *times)
    for batch in (1, 8, 64, 256):
        rows = measured(f"attention-decode-b{batch}-t2112-bfloat16")
        forms = [rows[f"step/{form}"] for form in ("native", "triton")]
        times = [us(row["median_ms"]) for row in forms]
        yield line(f"`shared_key_attention_step`, {batch}", us(forms[0]["floor_ms"]), *times)


ATTENTION = ("triton/expanded", "flex/expanded", "flex/repeated", "sdpa/expanded", "sdpa/repeated")


def attention():
    for what, title in PASSES.items():
        for shape, tokens in SHAPES.items():
            rows = measured(f"attention-{what}-{shape}-bfloat16")
            ours = rows[ATTENTION[0]]
            times = [us(rows[name]["median_ms"]) for name in ATTENTION]
            share = percent(ours["floor_share"])
            yield line(f"{title}, {tokens}", us(ours["floor_ms"]), times[0], share, *times[1:])


def attention_bytes():
    for what, title in PASSES.items():
        rows = measured(f"attention-{what}-b8-t4096-bfloat16")
        yield line(title, *(megabytes(rows[name]["peak_bytes"]) for name in ATTENTION))


def attention_floors():
    for what in ("forward", "backward"):
        for shape, tokens in SHAPES.items():
            forward, training = (
                measured(f"attention-{name}-{shape}-bfloat16")["triton/expanded"] for name in PASSES
            )
            floor, time = forward["floor_ms"], forward["median_ms"]
            if what == "backward":
                floor, time = training["floor_ms"] - floor, training["median_ms"] - time
            yield line(f"{what}, {tokens}", us(floor), us(time), percent(floor / time))
    for batch in (1, 8, 64, 256):
        row = measured(f"attention-decode-b{batch}-t2112-bfloat16")["step/native"]
        title = f"step at a full window, {batch} sequence{'s' if batch > 1 else ''}"
        floor, time = row["floor_ms"], row["median_ms"]
        yield line(title, us(floor), us(time), percent(floor / time))


def tokens_of(name):
    return f"{int(name[1:]):,}"


def decode():
    """Milliseconds a token of every sequence."""
    models = "rodimus-1.4b/engine", "rwkv6-1.6b/graph", "qwen2-1.5b/graph"
    for batch, context in DECODE:
        name = f"decode-{batch}-{context}-bfloat16"
        rows, count = measured(name), record(name)["settings"]["steps"]
        ours = rows["rodimus-plus-1.6b/engine"]
        each = lambda value, count=count: f"{value / count:.2f}"
        times = each(ours["floor_ms"]), each(ours["median_ms"]), f"{ours['tokens_per_s']:,.0f}"
        peers = [each(rows[model]["median_ms"]) for model in models]
        yield line(batch[1:], tokens_of(context), *times, *peers)


def caches():
    """Milliseconds a token by what keeps the state; a star where samples lie far apart."""
    name = "decode-b1-t4096-bfloat16"
    rows, count = measured(name), record(name)["settings"]["steps"]
    engines = {
        "dynamic": "growing cache",
        "static": "static cache",
        "graph": "static cache, step recorded in a graph",
        "engine": "engine",
    }

    def cell(model, engine):
        row = rows.get(f"{model}/{engine}")
        star = " *" if row and row["noisy"] else ""
        return f"{row['median_ms'] / count:.2f}{star}" if row else "-"

    for engine, title in engines.items():
        models = "rodimus-plus-1.6b", "rodimus-1.4b", "qwen2-1.5b"
        yield line(title, *(cell(model, engine) for model in models))


TRAINED = {
    "rodimus-plus-1.6b/dynamic": "Rodimus+ 1.6B",
    "rodimus-1.4b/dynamic": "Rodimus 1.4B",
    "rwkv6-1.6b/own": "RWKV6 1.6B",
    "qwen2-1.5b/dynamic": "Qwen2 1.5B",
}


TRAIN_CASES = (("b4-t4096", "4 x 4,096"), ("b1-t16384", "1 x 16,384"))


def train():
    for case, tokens in TRAIN_CASES:
        rows = measured(f"train-{case}-bfloat16")
        for target, title in TRAINED.items():
            if target not in rows:
                yield line(tokens, title, *["not measured"] * 5)
                continue
            row = rows[target]
            spread = f"{row['median_ms']:.0f} ({row['p20_ms']:.0f} to {row['p80_ms']:.0f})"
            rates = f"{row['tokens_per_s']:,.0f}", f"{row['TFLOPs']:.0f}"
            memory = f"{row['step_bytes'] / 1e9:.1f}"
            yield line(tokens, title, spread, *rates, percent(row["share_of_gemm"]), memory)


def train_kernels():
    for kernel in measured("train-b4-t4096-bfloat16")["rodimus-plus-1.6b/dynamic"]["kernels"]:
        name, time = f"`{kernel['name']}`", f"{kernel['ms']:.1f}"
        yield line(name, str(kernel["launches"]), time, f"{kernel['share']:.1%}")


LATENCY_MODELS = (
    *("rodimus-plus-1.6b/engine", "rodimus-1.4b/engine"),
    *("qwen2-1.5b/graph", "rwkv6-1.6b/graph"),
)


def readme_gpu():
    """Decoding and a training step, ours and the peers."""
    for batch, context in DECODE:
        name = f"decode-{batch}-{context}-bfloat16"
        rows, count = measured(name), record(name)["settings"]["steps"]
        where = f"batch {batch[1:]} after {tokens_of(context)} tokens"
        rows = [rows[model] for model in LATENCY_MODELS]
        if batch == "b1":
            yield line(f"ms a token, {where}", *(f"{x['median_ms'] / count:.2f}" for x in rows))
        else:
            yield line(f"tokens/s, {where}", *(f"{x['tokens_per_s']:,.0f}" for x in rows))
    engines = {"rodimus-plus-1.6b": "dynamic", "rodimus-1.4b": "dynamic"}
    engines |= {"qwen2-1.5b": "dynamic", "rwkv6-1.6b": "own"}
    for case, tokens in TRAIN_CASES:
        rows = measured(f"train-{case}-bfloat16")
        rows = [rows.get(f"{model}/{engine}") for model, engine in engines.items()]
        rates = (f"{row['tokens_per_s']:,.0f}" if row else "not measured" for row in rows)
        yield line(f"tokens/s of a training step, {tokens} tokens", *rates)


def readme_cpu():
    models = [model.partition("/")[0] for model in LATENCY_MODELS]
    for context in CPU_CONTEXTS:
        rows = measured(f"decode-b1-{context}-bfloat16", CPU)
        fastest = [
            min((rows[t] for t in rows if t.startswith(f"{model}/")), key=lambda r: r["median_ms"])
            for model in models
        ]
        ratios = [fastest[0][f"ratio_to_{model}"] for model in models[2:]]
        ratios = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high, _ in ratios]
        times = (f"{row['median_ms']:.0f}" for row in fastest)
        yield line(tokens_of(context), *times, *ratios)


def tokens_of_cpu():
    """A token against the bytes it needs, at the memory's rate of the same rounds."""
    for context in CPU_CONTEXTS:
        case = f"decode-b1-{context}-bfloat16"
        rows = measured(case, CPU)
        cells = []
        for model in ("rodimus-plus-1.6b", "rodimus-1.4b"):
            row = rows[f"{model}/engine"]
            low, high = row["floor_share_range"]
            cells += [f"{row['floor_ms']:.1f}", f"{row['median_ms']:.1f}"]
            cells.append(f"{percent(row['floor_share'])} ({percent(low)} to {percent(high)})")
        yield line(tokens_of(context), f"{read_rate(case):.1f}", *cells)


def read_rate(case):
    """GB/s of the read that took its turn in every round; the median."""
    read = record(case, CPU)["settings"][harness.READ]
    return read["bytes"] / median(read["samples"]["wall_ms"]) / 1e6


QUALITY = (
    ("mqar-cpu-n16", "64/8"),
    ("passkey-cpu", "128"),
    ("language-cpu", "val at 128"),
    ("language-cpu", "val at 512"),
)
VARIANTS = {
    "rodimus": "Rodimus",
    "gla": "GLA",
    "mamba2": "Mamba2",
    "rwkv6": "RWKV6",
    "none": "no gate",
    "rodimus_plus": "Rodimus+",
    "attention": "attention",
}


def quality():
    for variant, title in VARIANTS.items():
        cells = []
        for case, test in QUALITY:
            row = measured(f"quality-{case}", CPU).get(variant)
            scores = sorted(row["scores"][test]) if row else []
            mean = sum(scores) / len(scores) if scores else 0.0
            cells.append(f"{mean:.2f} ({scores[0]:.2f} to {scores[-1]:.2f})" if scores else "-")
        yield line(title, *cells)


# by document, from docs/
TABLES = {
    "../README.md": (readme_gpu, readme_cpu),
    "../benchmarks/README.md": (quality,),
    "kernels/ddts.md": (ddts, surroundings),
    "kernels/shared_key_attention.md": (attention_floors, attention, attention_bytes),
    "kernels/decode.md": (decode, steps, tokens_of_cpu),
    "generation.md": (caches,),
    "training.md": (train, train_kernels),
}
SOURCES = {
    "../README.md": (),
    "../benchmarks/README.md": (),
    "kernels/ddts.md": ("ddts-forward", "ddts-training", "ddts-surroundings"),
    "kernels/shared_key_attention.md": (
        *("attention-forward", "attention-training", "attention-decode"),
    ),
    "kernels/decode.md": ("decode", "ddts-step", "attention-decode"),
    "generation.md": ("decode-b1-t4096",),
    "training.md": ("train",),
}


def text_of(document):
    return (DOCS / document).read_text(encoding="utf-8")


def flat(document):
    return " ".join(text_of(document).split())


def training_row(case="b4-t4096"):
    return measured(f"train-{case}-bfloat16")["rodimus-plus-1.6b/dynamic"]


def kernel_sum(row):
    """Milliseconds of all kernels of the step that was profiled."""
    return row["kernels"][0]["ms"] / row["kernels"][0]["share"]


def of_matrix_rate(kernel, products):
    """Share of the matrix rate at which a kernel of the step makes its products of visible
    pairs."""
    (found,) = [k for k in training_row()["kernels"] if k["name"] == kernel]
    forward = bench_attention.flops("forward", 4, 4096, 128, 2049)
    rate = record("train-b4-t4096-bfloat16")["ceilings"]["gemm_TFLOPs"]
    least_ms = products / 2 * forward / rate / 1e9
    return found["ms"] / found["launches"], least_ms * found["launches"] / found["ms"]


CASES = [(document, table) for document, tables in TABLES.items() for table in tables]


@pytest.mark.parametrize(("document", "table"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_table_is_what_the_records_say(document, table):
    found = dict(MARKER.findall(text_of(document)))
    expected = list(table())
    rows = found[table.__name__].splitlines()[2:]
    assert rows == expected, "expected\n" + "\n".join(expected)


@pytest.mark.parametrize("document", TABLES)
def test_every_marked_table_is_computed(document):
    marked = {name for name, _ in MARKER.findall(text_of(document))}
    assert marked == {table.__name__ for table in TABLES[document]}
    assert text_of(document).count("<!-- measured:") == len(marked)


@pytest.mark.parametrize("document", TABLES)
def test_machine_date_and_versions_stand_with_the_tables(document):
    for group in SOURCES[document]:
        assert f"`{group}" in text_of(document), f"{group} is not named"
        for path in sorted(RESULTS.glob(f"{group}*.json")):
            one = json.loads(path.read_text(encoding="utf-8"))
            versions = one["machine"]["versions"]
            said = f"{one['machine']['name']}, {one['date'][:10]}, torch {versions['torch']},"
            said += f" Triton {versions['triton']}"
            assert said in flat(document), f"{path.name}: expected {said!r}"


def token_ms(context):
    """Milliseconds a token at batch 1, and its floor, by target."""
    name = f"decode-b1-{context}-bfloat16"
    steps = record(name)["settings"]["steps"]
    return {
        target: (row["median_ms"] / steps, row["floor_ms"] / steps)
        for target, row in measured(name).items()
    }


@pytest.mark.parametrize("document", ["../README.md", "generation.md"])
def test_the_engine_takes_a_third_of_the_growing_cache(document):
    times = token_ms("t4096")
    engine, growing = (times[f"rodimus-plus-1.6b/{name}"][0] for name in ("engine", "dynamic"))
    assert 2.8 < growing / engine < 3.2
    text = flat(document)
    assert f"{engine:.2f} ms a token against {growing:.2f}" in text


def test_what_the_readme_says_of_the_gpu_follows_from_the_records():
    text = flat("../README.md")
    floor = token_ms("t4096")["rodimus-plus-1.6b/engine"][1]
    assert f"{floor:.2f} ms" in text
    for row in readme_gpu():
        if "batch 64" in row or "batch 256" in row:
            *ours, _, rwkv = (float(x.replace(",", "")) for x in row.strip("| ").split(" | ")[1:])
            assert rwkv > max(ours), "the text says who wins in large batches"


def test_what_the_readme_says_of_the_cpu_follows_from_the_records():
    text = flat("../README.md")
    states = {"fast": ([], []), "slow": ([], [])}
    shares = []
    for context in CPU_CONTEXTS:
        rows = measured(f"decode-b1-{context}-bfloat16", CPU)
        shares.append(rows["rodimus-plus-1.6b/engine"]["floor_share"])
        ours, *peers = (
            rows[target]["samples"]["wall_ms"]
            for target in ("rodimus-plus-1.6b/engine", "qwen2-1.5b/static", "rwkv6-1.6b/package")
        )
        for first in (0, 15, 30):
            of_run = lambda times, first=first: round(median(times[first : first + 15]))
            # whether reading was fast in that run; the peers compute more than they read
            found = states["fast" if of_run(ours) < 65 else "slow"]
            found[0].append(of_run(ours))
            found[1].extend(map(of_run, peers))
    (fast, beside_fast), (slow, beside_slow) = states.values()
    assert f"took {min(fast)} to {max(fast)} ms and the peers" in text
    assert f"the peers {min(beside_fast)} to {max(beside_fast)}, in the other" in text
    assert f"the other {min(slow)} to {max(slow)} and {min(beside_slow)} to" in text
    assert f"and {min(beside_slow)} to {max(beside_slow)}." in text
    assert f"{percent(min(shares))} to {percent(max(shares))} of the memory's rate" in text
    prefill = measured("prefill-b1-t512-bfloat16", CPU)["rodimus-plus-1.6b/dynamic"]
    assert f"{prefill['ratio_to_qwen2-1.5b'][0]:.1f} times as fast as Qwen2's" in text
    _, low, high, _ = prefill["ratio_to_rwkv6-1.6b"]
    assert low < 1 < high


def test_what_is_said_of_attention_follows_from_the_records():
    text = flat("kernels/shared_key_attention.md")
    forward, training = (
        measured(f"attention-{name}-b8-t4096-bfloat16")["triton/expanded"] for name in PASSES
    )
    # seven of two products each
    least = 3.5 * forward["floor_ms"]
    share = least / (training["median_ms"] - forward["median_ms"])
    assert f"makes them at {percent(share)} of the matrix rate" in text
    dkv, dq = (
        of_matrix_rate(f"shared_key_attention_{name}_kernel", products)[1]
        for name, products in (("dkv", 4), ("dq", 3))
    )
    assert f"its four products at {percent(dkv)} of the matrix rate, dq its three at" in text
    assert f"dq its three at {percent(dq)}" in text


def test_what_is_said_of_decoding_follows_from_the_records():
    text = flat("kernels/decode.md")
    both = [token_ms(context)["rodimus-plus-1.6b/engine"] for context in ("t4096", "t131072")]
    times = [time for time, _ in both]
    assert f"the floor is {percent(both[0][1] / times[0])} of the time" in text
    assert f"costs {times[1] / times[0] - 1:.1%} more" in text
    step = measured("attention-decode-b1-t2112-bfloat16")["step/native"]
    assert f"alone {us(step['median_ms'])} us, is {LAYERS * step['median_ms']:.2f} ms" in text
    assert f"for bytes of {LAYERS * step['floor_ms']:.2f}" in text
    rest = times[0] - LAYERS * (0.0438 + step["median_ms"])
    assert f"The rest, {rest:.2f} ms," in text
    for batch, faster in (("b8-t4096", False), ("b64-t1024", True), ("b256-t1024", True)):
        rows = measured(f"decode-{batch}-bfloat16")
        rwkv = rows["rwkv6-1.6b/graph"]["median_ms"]
        ours = [rows[f"rodimus-{x}/engine"]["median_ms"] for x in ("plus-1.6b", "1.4b")]
        assert (rwkv < min(ours)) == faster


def test_what_is_said_of_training_follows_from_the_records():
    text, row = flat("training.md"), training_row()
    total, median = kernel_sum(row), row["median_ms"]
    alone = 4 * 4096 / total * 1e3
    assert f"sum to {total:.0f} ms, which would be {alone:,.0f} tokens/s" in text
    walls = row["samples"]["wall_ms"]
    assert f"what the other {median - total:.0f} ms of the median are was not measured" in text
    assert f"({min(walls):.0f} to {max(walls):.0f} ms)" in text
    peer = measured("train-b1-t16384-bfloat16")["rwkv6-1.6b/own"]["samples"]["wall_ms"]
    assert f"differ by {max(peer) - min(peer):.0f} ms" in text
    backward = ("shared_key_attention_dkv_kernel", "shared_key_attention_dq_kernel")
    dkv, dq = (of_matrix_rate(name, n)[1] for name, n in zip(backward, (4, 3), strict=True))
    spent = sum(kernel["ms"] for kernel in row["kernels"] if kernel["name"] in backward)
    assert f"{spent:.0f} ms, at {percent(dkv)} (dkv) and {percent(dq)} (dq)" in text
    outside = 1 - sum(kernel["share"] for kernel in row["kernels"])
    assert f"outside these ten lie {percent(outside)} of the time" in text
