"""Pictures of the records, readable in black and white: every model has its marker and dash."""

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

# group: marker and name of an operator; only some of those around the mixers have products
OPERATORS = {
    "ddts-forward": ("o", "DDTS"),
    "ddts-training": ("s", "DDTS and backward"),
    "ddts-step": ("^", "DDTS step"),
    "attention-forward": ("D", "attention"),
    "attention-training": ("v", "attention and backward"),
    "attention-decode": ("P", "attention step"),
    "fused-forward": ("X", "loss, input gate"),
    "fused-training": ("*", "loss, input gate and backward"),
}
# groups of several operators, in one record or in one each
AROUND = ("fused-forward", "fused-training", "ddts-surroundings")
OUR_FORMS = {"triton", "triton_chunk", "triton_recurrent", "native"}


def _alike(found: list[Record], group: str, **settings: Any) -> list[Record]:
    """The records of a group with these settings, by default bfloat16 and unrounded weights."""
    settings = {"weights": None, "dtype": "bfloat16", **settings}
    return [
        record
        for record in found
        if record["group"] == group
        and all(record["settings"].get(name) == value for name, value in settings.items())
    ]


def _measured(found: list[Record], group: str, x: str, y: str, **settings: Any) -> Points:
    """``y`` of each model over setting ``x``, in records that are alike: of ``engine`` if that was
    timed, because the best of several equal engines would be the luckiest; else the best."""
    best = min if y.endswith("_ms") else max
    points: Points = {}
    for record in _alike(found, group, **settings):
        rows = {row["target"]: row for row in measured(record) if y in row}
        for target, row in rows.items():
            name = model_of(target)
            if target != f"{name}/engine" and f"{name}/engine" in rows:
                continue
            line = points.setdefault(name, {})
            place = record["settings"][x]
            # a timed call of decoding may produce several tokens
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
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_plain)
    if log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 10 * low:
            axes.yaxis.set_minor_formatter(_plain)
        else:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        # start at 0, so that only a line that falls to 0 seems to do so
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(_plain)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="both", color="0.9", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)


def _plain(value: float, _: object = None) -> str:
    """``0.25``, ``131,072``."""
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def decode_latency(found: list[Record], axes: Any) -> None:
    """Milliseconds per token over the context, with the memory floors dotted. Floors are left out
    if a time is below its floor: the machine was slower when the memory rate was measured."""
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
    """GB/s of the memory while each context of batch 1 was timed, if reads were timed as well."""
    asked = [record["settings"] for record in _alike(found, "decode", batch=1)]
    reads = [settings[READ] for settings in asked if READ in settings]
    return [read["bytes"] / median(read["samples"]["wall_ms"]) / 1e6 for read in reads]


def decode_throughput(found: list[Record], axes: Any) -> None:
    """Tokens per second over the batch, at the context that was timed with the most batches."""
    context = _most_batches(found)
    _draw(axes, _measured(found, "decode", "batch", "tokens_per_s", context=context))
    _finish(axes, f"Decoding after {context:,} tokens of context", "batch", "tokens a second")


def _most_batches(found: list[Record]) -> int:
    """The context that was timed with the most batches; of several, the longest."""
    batches: dict[int, set[int]] = {}
    for settings in (record["settings"] for record in _alike(found, "decode")):
        batches.setdefault(settings["context"], set()).add(settings["batch"])
    return max(batches, key=lambda context: (len(batches[context]), context), default=0)


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
    """Tokens per second over the prompt's length."""
    _draw(axes, _measured(found, "prefill", "context", "tokens_per_s"))
    _finish(axes, "Prefill, batch 1", "prompt, tokens", "tokens a second")


def train_speed(found: list[Record], axes: Any) -> None:
    """Tokens per second over the length of a row, at a fixed number of tokens per step."""
    _draw(axes, _measured(found, "train", "context", "tokens_per_s"))
    _finish(axes, "Training step", "tokens a row", "tokens a second", log_y=False)


def long_rows(found: list[Record], axes: Any) -> None:
    """Tokens per second of the trainer over the length of a row, at fixed tokens per step."""
    _draw(axes, _measured(found, "long", "context", "tokens_per_s"))
    title = "Step of rodimus train with recomputation"
    _finish(axes, title, "tokens a row", "tokens a second", log_y=False)


def roofline(found: list[Record], axes: Any) -> None:
    """TFLOP/s of operators over their operations per byte, below the rates that memory and matrix
    units reached in the run: our fastest and the fastest other of each record."""
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
            # alternate sides: numbers near each other would overlap
            side = next(sides)
            place = {"xytext": (5 * side, -3 * side), "ha": "left" if side > 0 else "right"}
            place |= {"textcoords": "offset points", "fontsize": 6}
            axes.annotate(f"{record['settings']['batch']}", (intensity, rate), **place)
    title = "Operators in bf16 (filled: ours; hollow: fastest other; numbers: sequences)"
    title += f"\nline: {copy:,.0f} GB/s of a copy and {gemm:,.0f} TFLOP/s of a GEMM, as measured"
    _finish(axes, title, "operations a byte that has to move", "TFLOP/s")


def _operators(found: list[Record]) -> Iterator[tuple[Record, float, float, bool]]:
    """Record, operations per byte, TFLOP/s and whether it is ours, of the fastest row of each side
    in bfloat16, if both bytes and operations are counted."""
    for record in (r for group in OPERATORS for r in _alike(found, group, cache=None)):
        sides: dict[bool, list[Mapping[str, Any]]] = {}
        for row in measured(record):
            if _is_compared(row):
                sides.setdefault(_is_ours(row), []).append(row)
        for ours, rows in sides.items():
            best = min(rows, key=lambda row: row["median_ms"])
            moved, flops = work.of(record, best)
            if moved and flops:
                yield record, flops / moved, flops / best["median_ms"] / 1e9, ours


def roof(found: list[Record], axes: Any) -> None:
    """How much of its roof each operator reaches, ours and the fastest other."""
    names: list[str] = []
    for name, sides in _shares(found):
        names.append(name)
        for ours, share in sides.items():
            style = {"color": "0.0", "markerfacecolor": "0.0" if ours else "white", "zorder": 3}
            label = "ours" if ours else "fastest other"
            seen = label in axes.get_legend_handles_labels()[1]
            marker = "o" if ours else "s"
            label = "_again" if seen else label
            axes.plot([100 * share], [len(names) - 1], marker, label=label, markersize=6, **style)
    axes.axvline(100, color="0.0", linewidth=1)
    axes.set_xlim(left=0)
    # one more row, for the legend
    axes.set_ylim(len(names) + 0.4, -0.6)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title("Operators in bf16: share of the roof", fontsize=10)
    axes.set_xlabel("% of the rate of a copy or of a large GEMM")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, loc="lower center", ncols=2)
    axes.figure.set_figheight(1.4 + 0.2 * len(names))


def _shares(found: list[Record]) -> Iterator[tuple[str, dict[bool, float]]]:
    """Name of an operator at a size, and the share of its roof that the fastest of each side
    reaches; only once if several records have it."""
    told: set[str] = set()
    for group in dict.fromkeys((*OPERATORS, *AROUND)):
        sized = lambda record: (record["settings"]["batch"], record["settings"]["context"])
        for record in sorted(_alike(found, group, cache=None), key=sized):
            rows: dict[str, dict[bool, Mapping[str, Any]]] = {}
            for row in measured(record):
                name = row["family"] if group in AROUND else OPERATORS[group][1]
                if _is_compared(row) and row.get("floor_share"):
                    sides = rows.setdefault(name, {})
                    best = sides.setdefault(_is_ours(row), row)
                    sides[_is_ours(row)] = min(best, row, key=lambda x: x["median_ms"])
            for operator, sides in rows.items():
                name = operator + " and backward" * (group == "fused-training")
                name = f"{name}, {_size(record['settings'], group)}"
                if name not in told:
                    told.add(name)
                    yield name, {ours: row["floor_share"] for ours, row in sides.items()}


def _is_compared(row: Mapping[str, Any]) -> bool:
    """False for what reads other bytes, and for our reference, which is not written for speed."""
    return row["family"] != "step-int8" and row["engine"] != "reference"


def _is_ours(row: Mapping[str, Any]) -> bool:
    return not OUR_FORMS.isdisjoint((row["family"], row["engine"]))


def _size(settings: Mapping[str, Any], group: str) -> str:
    """``8 x 4,096``, or for a step ``8 sequences``."""
    batch = settings["batch"]
    if group.endswith(("step", "decode")):
        return f"{batch} sequence{'s' * (batch > 1)}"
    width = f", V {settings['value_dim']:,}" if group in ("ddts-forward", "ddts-training") else ""
    return f"{batch} x {settings['context']:,}{width}"


def recall(found: list[Record], axes: Any) -> None:
    """Accuracy of the hardest recall test over the state expansion, ours and the paper's; attention
    has no state to expand."""
    lines: Points = {}
    for record in _recall_records(found):
        expansion = record["settings"]["shape"]["mem_size"]
        for row in measured(record):
            score = mean(row["scores"][HARDEST_RECALL])
            if row["target"] == "attention":
                axes.axhline(score, color="0.0", linewidth=0.8, linestyle="--", label="attention")
            else:
                lines.setdefault(row["target"], {})[expansion] = score
    # the dark styles are for ours
    order = sorted(lines.items(), key=lambda item: (not item[0].startswith("rodimus"), item[0]))
    for (name, line), (marker, dash, grey) in zip(order, STYLES.values(), strict=False):
        places = sorted(line)
        style = {"marker": marker, "linestyle": dash, "color": grey, "label": name}
        axes.plot(places, [line[place] for place in places], **style)
    for (name, line), marker in zip(PAPER_MQAR.items(), "ox^v", strict=True):
        style = {"marker": marker, "markerfacecolor": "white", "color": "0.75", "linewidth": 0.8}
        axes.plot(list(line), list(line.values()), label=f"paper: {name}", **style)
    _finish(axes, "Recall at 1024 tokens, 256 pairs", "state expansion", "accuracy", log_y=False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _recall_records(found: list[Record]) -> list[Record]:
    return [
        record
        for record in found
        if record["group"] == "quality" and record["case"].startswith("mqar-gpu")
    ]


class Plot(NamedTuple):
    """One kind of picture.

    Attributes:
        title: Title of the picture in ``RESULTS.md``.
        axis: The setting that must have several values; None if any record is enough.
        source: Selects the records that it shows.
        draw: Draws them.
    """

    title: str
    axis: str | None
    source: Callable[[list[Record]], list[Record]]
    draw: Callable[[list[Record], Any], None]


def _of_a_batch(group: str) -> Callable[[list[Record]], list[Record]]:
    return lambda found: _alike(found, group, batch=1)


PLOTS = {
    "decode_latency": Plot(
        "Decode latency against context", "context", _of_a_batch("decode"), decode_latency
    ),
    "decode_throughput": Plot(
        "Decode throughput against batch",
        "batch",
        lambda found: _alike(found, "decode", context=_most_batches(found)),
        decode_throughput,
    ),
    "state_memory": Plot("State memory against context", None, _of_a_batch("memory"), state_memory),
    "prefill_speed": Plot(
        "Prefill speed against length", "context", _of_a_batch("prefill"), prefill_speed
    ),
    "train_speed": Plot(
        "Training speed against length",
        "context",
        lambda found: _alike(found, "train"),
        train_speed,
    ),
    "long_rows": Plot(
        "Training speed with long rows", "context", lambda found: _alike(found, "long"), long_rows
    ),
    "roofline": Plot(
        "Operators below the roofs of memory and GEMMs",
        "case",
        lambda found: [record for record, *_ in _operators(found)],
        roofline,
    ),
    "roof": Plot(
        "Share of the roof that operators reach",
        None,
        lambda found: [
            record
            for group in dict.fromkeys((*OPERATORS, *AROUND))
            for record in _alike(found, group, cache=None)
            if any(row.get("floor_share") for row in measured(record))
        ],
        roof,
    ),
    "recall": Plot("Recall against state expansion", "case", _recall_records, recall),
}


class Picture(NamedTuple):
    """A plot of one machine's records: its title, its path, where and when its records were made,
    and how it is drawn."""

    title: str
    path: str
    made: str
    records: list[Record]
    draw: Callable[[list[Record], Any], None]


def pictures(found: list[Record]) -> Iterator[Picture]:
    """Every picture that the records allow and that says more than a point. Machines never share a
    picture: a line from one to the other would mean nothing."""
    for machine in sorted({record["machine"]["name"] for record in found}):
        mine = [record for record in found if record["machine"]["name"] == machine]
        for name, plot in PLOTS.items():
            shown = plot.source(mine)
            if not _says_more_than_a_point(plot.axis, shown):
                continue
            days = sorted({record["date"][:10] for record in shown})
            made = f"{machine}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"
            path = f"plots/{folder_name(machine)}/{name}.png"
            yield Picture(f"{plot.title}, {machine}", path, made, mine, plot.draw)


def _says_more_than_a_point(axis: str | None, shown: list[Record]) -> bool:
    if axis is None:
        return bool(shown)
    places = {record["case"] if axis == "case" else record["settings"][axis] for record in shown}
    return len(places) > 1


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
        axes.set_title(f"{axes.get_title()}\n{picture.made}", fontsize=10)
        # without the version of matplotlib the same records give the same bytes
        figure.savefig(path, dpi=130, metadata={"Software": None})
        pyplot.close(figure)
    return names(found)
