"""Kernels are compiled for the architectures whose limits are known."""

import pytest

pytest.importorskip("triton")

from benchmarks import aot


def test_an_architecture_without_a_limit_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(aot, "table", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setattr("sys.argv", ["aot", "--arch", "123"])
    with pytest.raises(SystemExit):
        aot.main()
    assert "80, 86, 90, 100" in capsys.readouterr().err
