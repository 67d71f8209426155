"""The figures of a step; and the console: a line rewritten in place on a terminal, plain lines
everywhere else."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from rodimus.train import metrics
from rodimus.train.config import LogSection
from rodimus.train.console import Console, clock, progress_line

VALUES = {"loss": 4.3214, "lr": 4e-3, "grad_norm": 0.851, "tokens_per_s": 9120.4, "left_s": 133}
LINE = "step 120/900  loss 4.3214  lr 4.00e-03  grad 0.85  9,120 tok/s  left 02:13"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_line_names_step_loss_rates_and_time_left():
    assert progress_line(120, 900, VALUES) == LINE
    gpu = {**VALUES, "mfu": 0.512, "hfu": 0.604, "memory_gb": 61.26}
    assert "9,120 tok/s  MFU 51.2%  HFU 60.4%  61.3 GB  left" in progress_line(120, 900, gpu)
    assert clock(3723) == "1:02:03"


def shown(file):
    console = Console(file)
    console.say("hello")
    console.progress(120, 900, VALUES)
    console.progress(121, 900, VALUES)
    console.say("held out: loss 1")
    console.progress(900, 900, VALUES)
    console.close()
    return file.getvalue()


def test_rates_are_those_of_the_interval_and_of_all_devices(monkeypatch):
    seconds = iter([10.0, 14.0, 20.0, 20.0, 25.0, 25.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(metrics.torch.cuda, "max_memory_allocated", lambda: 61_260_000_000)
    meter = metrics.Meter(4, useful=6.0, spent=8.0, peak=600.0)
    meter.add(1000, 3.0)
    # as after an evaluation
    meter.reset(10)
    meter.add(100, 0.5)
    meter.add(300, 1.0)
    figures = meter.read(12, 22)
    assert figures.pop("memory_gb") == pytest.approx(61.26)
    # 400 tokens in 6 s, two steps of twelve
    rates = {"tokens_per_s": 400 / 6, "tokens_per_s_rank": 100 / 6, "data_wait": 0.25}
    shares = {"mfu": 6 * 400 / 6 / 2400, "hfu": 8 * 400 / 6 / 2400}
    assert figures == pytest.approx({**rates, **shares, "left_s": 30.0})
    meter.add(100, 0.0)
    again = meter.read(13, 22)
    assert (again["tokens_per_s"], again["data_wait"], again["left_s"]) == (20.0, 0.0, 45.0)


def test_a_record_that_was_cut_does_not_spoil_the_next(tmp_path):
    log = metrics.RunLog(tmp_path, LogSection(), 0, enabled=True)
    file, sizes = log._file, [5, None, None]
    write = lambda line: file.write(line[: sizes.pop(0)])
    log._file = SimpleNamespace(write=write, close=file.close)
    for step in (1, 2, 3):
        log.record(step, loss=1.0)
    log.close()
    cut, *whole = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert cut == '{"ste' and [json.loads(line)["step"] for line in whole] == [2, 3]


def test_pipes_get_plain_lines():
    second, last = LINE.replace("120/", "121/"), LINE.replace("120/", "900/")
    lines = ["hello", LINE, second, "held out: loss 1", last]
    assert shown(io.StringIO()) == "".join(line + "\n" for line in lines)


def test_terminal_rewrites_one_line(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal())
    hello, standing, last, end = text.split("\n")
    assert (hello, end) == ("hello", "")
    assert standing.count("\r") == 3 and standing.endswith("\x1b[Kheld out: loss 1")
    assert LINE in standing and LINE.replace("120/", "121/") in standing
    assert "\u2501" in last and "step 900/900" in last
    assert "\x1b[?25l" not in text, "the cursor must stay visible"


def test_narrow_terminal_cuts_the_line(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal())
    assert "step 120/900" in text and "left" not in text and text.count("\n") == 3


@pytest.mark.parametrize("how", ["no rich", "dumb terminal"])
def test_terminal_without_rich_gets_plain_lines(how, monkeypatch):
    monkeypatch.setenv("TERM", "dumb" if how == "dumb terminal" else "xterm")
    if how == "no rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "\r" not in shown(Terminal())
