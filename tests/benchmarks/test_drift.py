"""What is told of a long context is what the models do there."""

import pytest
import torch

from benchmarks import records, report
from benchmarks.quality import drift

CPU = torch.device("cpu")
FIRST, MOST = 32, 128


@pytest.fixture(scope="module", params=["rodimus_plus", "rodimus"])
def models(request):
    config = drift.shape(request.param, "demo")
    config.n_layer = 1
    return drift.made(config, CPU)


@pytest.fixture
def ids(models):
    vocab = models[torch.float32].config.vocab_size
    return torch.randint(
        vocab, (MOST + drift.COMPARED,), generator=torch.Generator().manual_seed(1)
    )


def test_powers_of_two_are_told_of_one_text(models, ids):
    found = list(drift.drifts(models, ids, FIRST))
    assert [point["length"] for point in found] == [32, 64, 128]
    reader = drift.Reader(models[torch.float32])
    reader.read(ids[:128])
    assert found[-1]["state_norm"] == pytest.approx(reader.state_norm(), rel=1e-5)
    for point in found:
        assert point["one_by_one"] < 1e-5
        assert 1e-4 < point["bfloat16"] < 2e-2


def test_the_two_dtypes_have_the_same_weights(models):
    exact, rounded = models[torch.float32], models[torch.bfloat16]
    for ours, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


def test_looking_ahead_does_not_move_on(models, ids):
    looking, plain = (drift.Reader(models[torch.float32]) for _ in range(2))
    for reader in (looking, plain):
        reader.read(ids[:FIRST])
    before = looking.state_norm()
    asked = ids[FIRST : FIRST + drift.COMPARED]
    ways = [looking.after(asked, one_by_one=way) for way in (True, False)]
    assert ways[0].shape == ways[1].shape == (drift.COMPARED, looking.model.config.vocab_size)
    assert looking.state_norm() == before
    assert torch.equal(looking.read(asked), plain.read(asked))


def test_a_state_that_is_lost_between_tokens_is_told(models, ids, monkeypatch):
    read = drift.Reader.read

    def forgets(reader, ids, kept=1):
        if len(ids) == 1:
            for layer in reader.cache.layers:
                for state in layer.recurrent_states.values():
                    state.mul_(0.9)
        return read(reader, ids, kept)

    monkeypatch.setattr(drift.Reader, "read", forgets)
    assert all(point["one_by_one"] > 1e-4 for point in drift.drifts(models, ids, FIRST))


def test_the_record_is_a_table_of_the_report(tmp_path, capsys):
    assert drift.main(["--out", str(tmp_path), "--first", "16", "--most", "32"]) == 0
    (record,) = records.read(tmp_path)
    assert [row["target"] for row in record["rows"]] == ["rodimus_plus", "rodimus"]
    text = report.render([record])
    assert "## Long contexts" in text and "| model | after tokens | 16 | 32 |" in text
    norm = record["rows"][1]["points"][1]["state_norm"]
    assert f" | {norm:.4g} |" in text
    with pytest.raises(SystemExit):
        drift.main(["--first", "64", "--most", "32"])
    assert "--first must be 1 .. 32, got 64" in capsys.readouterr().err
