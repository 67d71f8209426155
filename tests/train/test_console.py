"""The console: a line rewritten in place on a terminal, plain lines everywhere else."""

import io
import sys

import pytest

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
