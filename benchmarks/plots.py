"""Pictures of the records, readable in black and white: every model has a marker and a dash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from . import peers, sizes, work
from .harness import READ
from .machine import folder_name
from .quality.protocols import HARDEST_RECALL, PAPER_MQAR
from .records import measured, model_of

Record = Mapping[str, Any]
Points = dict[str, dict[float, float]]

# marker, dash and grey of each model; ours are the dark ones
STYLES = {
    "rodimus-plus-1.6b": ("o", "-", "0.0"),
    "rodimus-1.4b": ("s", "-", "0.3"),
    "qwen2-1.5b": ("^", "--", "0.15"),
    "rwkv6-1.6b": ("v", "-.", "0.35"),
    "qwen3-next-like-1.5b": ("D", ":", "0.5"),
    "mamba2-like-1.5b": ("P", ":", "0.65"),
    "fla-rodimus-plus-1.6b": ("X", "--", "0.6"),
}

# group: marker and name of an operator
OPERATORS = {
    "ddts-forward": ("o", "DDTS"),
    "ddts-training": ("s", "DDTS and backward"),
    "ddts-step": ("^", "DDTS step"),
    "attention-forward": ("D", "attention"),
    "attention-training": ("v", "attention and backward"),
    "attention-decode": ("P", "attention step"),
}
OUR_FORMS = {"triton", "triton_chunk", "triton_recurrent", "native"}


def _alike(found: list[Record], group: str, **settings: Any) -> list[Record]:
    """The records of a group whose settings agree: in bfloat16, of weights that are not rounded."""
    settings = {"weights": None, "dtype": "bfloat16", **settings}
    return [
        record
        for record in found
        if record["group"] == group
        and all(record["settings"].get(name) == value for name, value in settings.items())
    ]


def _measured(found: list[Record], group: str, x: str, y: str, **settings: Any) -> Points:
    """Best ``y`` of each model over setting ``x``, in records that are alike."""
    best = min if y.endswith("_ms") else max
    points: Points = {}
    for record in _alike(found, group, **settings):
        for row in measured(record):
            if y in row:
                line = points.setdefault(model_of(row["target"]), {})
                place = record["settings"][x]
                # a timed call of decoding may be several tokens
                value = row[y] / (record["settings"].get("steps", 1) if y.endswith("_ms") else 1)
                line[place] = best(line.get(place, value), value)
    return points


def _draw(axes: Any, points: Points, **style: Any) -> None:
    for name in (name for name in STYLES if name in points):
        marker, dash, grey = STYLES[name]
        places = sorted(points[name])
        values = [points[name][place] for place in places]
        options = {"marker": marker, "linestyle": dash, "color": grey, "label": name, **style}
        axes.plot(places, values, **options)


def _finish(axes: Any, title: str, x: str, y: str, *, log_y: bool = True) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if log_y:
        axes.set_yscale("log")
        if axes.get_ylim()[1] < 10 * axes.get_ylim()[0]:
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="both", color="0.9", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)


def decode_latency(found: list[Record], axes: Any) -> None:
    """Milliseconds a token over the context, with the memory floors dotted; without them where a
    time is below its floor: the machine was not the same when the memory's rate was measured."""
    times = _measured(found, "decode", "context", "median_ms", batch=1)
    floors = _measured(found, "decode", "context", "floor_ms", batch=1)
    title = "Decoding, batch 1"
    _draw(axes, times)
    if all(line[x] <= times[name][x] for name, line in floors.items() for x in line):
        small = {"markersize": 4, "markerfacecolor": "white", "linewidth": 0.9}
        _draw(axes, floors, linestyle=(0, (1, 3)), label="_floor", **small)
        title += " (dotted: memory floor)"
    rates = _read_rates(found)
    if rates and max(rates) > 1.1 * min(rates):
        low, high = min(rates), max(rates)
        title += f"\n(memory read {low:.0f} to {high:.0f} GB/s: compare at one context)"
    _finish(axes, title, "context, tokens", "ms a token")


def _read_rates(found: list[Record]) -> list[float]:
    """GB/s of the memory while each context of batch 1 was timed, where a read took its turn."""
    asked = [record["settings"] for record in _alike(found, "decode", batch=1)]
    reads = [settings[READ] for settings in asked if READ in settings]
    return [read["bytes"] / median(read["samples"]["wall_ms"]) / 1e6 for read in reads]


def decode_throughput(found: list[Record], axes: Any) -> None:
    """Tokens a second over the batch, at 4096 tokens of context."""
    _draw(axes, _measured(found, "decode", "batch", "tokens_per_s", context=4096))
    _finish(axes, "Decoding at 4096 tokens of context", "batch", "tokens a second")


def state_memory(found: list[Record], axes: Any) -> None:
    """State bytes over the context: lines by formula, markers where measured."""
    contexts = [2**power for power in range(7, 18)]
    lines: Points = {}
    for entry in peers.CATALOGUE[:-1]:
        config = sizes.config_of(entry.family, "full")
        size = lambda t, e=entry, c=config: sizes.state_bytes(e.family, c, 1, t, 2).total / 1e6
        lines[entry.name] = {context: size(context) for context in contexts}
    _draw(axes, lines, markerfacecolor="white", markersize=5)
    full = [r for r in found if r["settings"].get("scale") == "full"]
    points = _measured(full, "memory", "context", "state_bytes", batch=1)
    scaled = {name: {t: b / 1e6 for t, b in line.items()} for name, line in points.items()}
    _draw(axes, scaled, linestyle="", label="_measured", markersize=7)
    crossing = crossover()
    axes.axvline(crossing, color="0.6", linewidth=0.8)
    place = {"xy": (crossing, 4), "xytext": (4, 0), "textcoords": "offset points"}
    axes.annotate(
        f"from {crossing} tokens on\nqwen2 keeps more\nthan rodimus-plus", fontsize=7, **place
    )
    _finish(axes, "State of a sequence, bf16 (filled: measured)", "context, tokens", "MB")


def crossover() -> int:
    """The context from which Qwen2-1.5B keeps more bytes than Rodimus+-1.6B, bf16."""
    ours, theirs = (sizes.config_of(name, "full") for name in ("rodimus_plus", "qwen2"))
    size = lambda family, config, t: sizes.state_bytes(family, config, 1, t, 2).total
    low, high = 1, 2**20
    while low < high:
        middle = (low + high) // 2
        if size("qwen2", theirs, middle) > size("rodimus_plus", ours, middle):
            high = middle
        else:
            low = middle + 1
    return low


def prefill_speed(found: list[Record], axes: Any) -> None:
    """Tokens a second over the prompt's length."""
    _draw(axes, _measured(found, "prefill", "context", "tokens_per_s"))
    _finish(axes, "Prefill, batch 1", "prompt, tokens", "tokens a second")


def train_speed(found: list[Record], axes: Any) -> None:
    """Tokens a second over the length of a row, tokens a step fixed."""
    _draw(axes, _measured(found, "train", "context", "tokens_per_s"))
    _finish(axes, "Training step", "tokens a row", "tokens a second")


def roofline(found: list[Record], axes: Any) -> None:
    """TFLOP/s of operators over the operations a byte that they have to make, below what memory and
    matrix units of the run reach; the fastest of ours and the fastest other of each record."""
    points = [*_operators(found)]
    copy, gemm = (
        max(record["ceilings"][name] for record, *_ in points)
        for name in ("copy_GBps", "gemm_TFLOPs")
    )
    ridge = 1e3 * gemm / copy
    least = min(intensity for _, intensity, *_ in points) / 2
    most = 2 * max(ridge, *(intensity for _, intensity, *_ in points))
    roof = {least: copy * least / 1e3, ridge: gemm, most: gemm}
    axes.plot(list(roof), list(roof.values()), color="0.0", linewidth=1)
    sides = cycle((1, -1))
    for record, intensity, rate, ours in points:
        marker, label = OPERATORS[record["group"]]
        style = {"markerfacecolor": "0.0" if ours else "white", "zorder": 3 if ours else 2}
        seen = label in axes.get_legend_handles_labels()[1]
        style["label"] = "_again" if seen or not ours else label
        axes.plot([intensity], [rate], marker, color="0.0", markersize=5, **style)
        if ours and record["group"].endswith(("step", "decode")):
            # numbers near each other would overlap
            side = next(sides)
            place = {"xytext": (5 * side, -3 * side), "ha": "left" if side > 0 else "right"}
            place |= {"textcoords": "offset points", "fontsize": 6}
            axes.annotate(f"{record['settings']['batch']}", (intensity, rate), **place)
    title = "Operators in bf16 (filled: ours; hollow: fastest other; numbers: sequences)"
    title += f"\nline: {copy:,.0f} GB/s of a copy and {gemm:,.0f} TFLOP/s of a GEMM, as measured"
    _finish(axes, title, "operations a byte that has to move", "TFLOP/s")


def _operators(found: list[Record]) -> Iterator[tuple[Record, float, float, bool]]:
    """Record, operations a byte, TFLOP/s and whether it is ours, of the fastest row of each side in
    bfloat16, where both bytes and operations are counted."""
    for record in (r for group in OPERATORS for r in _alike(found, group, cache=None)):
        sides: dict[bool, list[Mapping[str, Any]]] = {}
        for row in measured(record):
            if row["family"] != "step-int8":
                ours = not OUR_FORMS.isdisjoint((row["family"], row["engine"]))
                sides.setdefault(ours, []).append(row)
        for ours, rows in sides.items():
            best = min(rows, key=lambda row: row["median_ms"])
            moved, flops = work.of(record, best)
            if moved and flops:
                yield record, flops / moved, flops / best["median_ms"] / 1e9, ours


def recall(found: list[Record], axes: Any) -> None:
    """Accuracy of the hardest recall test over the state expansion, ours and the paper's."""
    lines: Points = {}
    for record in _recall_records(found):
        expansion = record["settings"]["shape"]["mem_size"]
        for row in measured(record):
            lines.setdefault(row["target"], {})[expansion] = mean(row["scores"][HARDEST_RECALL])
    for (name, line), (marker, dash, grey) in zip(
        sorted(lines.items()), STYLES.values(), strict=False
    ):
        places = sorted(line)
        style = {"marker": marker, "linestyle": dash, "color": grey, "label": name}
        axes.plot(places, [line[place] for place in places], **style)
    for (name, line), marker in zip(PAPER_MQAR.items(), "ox^v", strict=True):
        style = {"marker": marker, "markerfacecolor": "white", "color": "0.75", "linewidth": 0.8}
        axes.plot(list(line), list(line.values()), label=f"paper: {name}", **style)
    _finish(axes, "Recall at 1024 tokens, 256 pairs", "state expansion", "accuracy", log_y=False)


def _recall_records(found: list[Record]) -> list[Record]:
    return [
        record
        for record in found
        if record["group"] == "quality" and record["case"].startswith("mqar-gpu")
    ]


PLOTS: dict[str, tuple[str, str, Callable[[list[Record], Any], None]]] = {
    "decode_latency": ("Decode latency against context", "decode", decode_latency),
    "decode_throughput": ("Decode throughput against batch", "decode", decode_throughput),
    "state_memory": ("State memory against context", "memory", state_memory),
    "prefill_speed": ("Prefill speed against length", "prefill", prefill_speed),
    "train_speed": ("Training speed against length", "train", train_speed),
    "roofline": ("Operators below the roofs of memory and GEMMs", "", roofline),
    "recall": ("Recall against state expansion", "quality", recall),
}


class Picture(NamedTuple):
    """A plot of one machine's records: its title, its path and how it is drawn."""

    title: str
    path: str
    records: list[Record]
    draw: Callable[[list[Record], Any], None]


def pictures(found: list[Record]) -> Iterator[Picture]:
    """Every picture that the records give and that says more than a point. Machines never share
    one: a line from one to the other would mean nothing."""
    for machine in sorted({record["machine"]["name"] for record in found}):
        mine = [record for record in found if record["machine"]["name"] == machine]
        for name, (title, group, draw) in PLOTS.items():
            if _says_more_than_a_point(name, group, mine):
                path = f"plots/{folder_name(machine)}/{name}.png"
                yield Picture(f"{title}, {machine}", path, mine, draw)


def _says_more_than_a_point(name: str, group: str, found: list[Record]) -> bool:
    if name == "recall":
        return len(_recall_records(found)) > 1
    if name == "roofline":
        return len({record["case"] for record, *_ in _operators(found)}) > 1
    axes = {"decode_throughput": ("batch", {"context": 4096}), "train_speed": ("context", {})}
    axis, fixed = axes.get(name, ("context", {"batch": 1}))
    places = {record["settings"][axis] for record in _alike(found, group, **fixed)}
    return len(places) > 1 or name == "state_memory" and bool(places)


def names(found: list[Record]) -> dict[str, str]:
    """Title and path of every picture."""
    return {picture.title: picture.path for picture in pictures(found)}


def draw_all(found: list[Record], out: Path) -> dict[str, str]:
    """Write the pictures of ``names`` below a folder and return them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    for picture in pictures(found):
        path = out / picture.path
        path.parent.mkdir(parents=True, exist_ok=True)
        figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
        picture.draw(picture.records, axes)
        # without the version of matplotlib the same records give the same bytes
        figure.savefig(path, dpi=130, metadata={"Software": None})
        pyplot.close(figure)
    return names(found)
