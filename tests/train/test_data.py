"""Order and rows: bijective, world-size free, boundaries where documents begin."""

import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rodimus.errors import InputError
from rodimus.train import parallel
from rodimus.train.batches import Prefetcher, TrainData, open_sources
from rodimus.train.bestfit import BestFitRows, best_fit
from rodimus.train.config import DataSection, ParallelSection
from rodimus.train.evaluate import Evaluator
from rodimus.train.order import SampleOrder, permute
from rodimus.train.parallel import Ranks
from rodimus.train.rows import ConcatRows, RowReader
from rodimus.train.shards import ShardWriter, TokenShards
from tests.train.ranks import run_ranks

DOCS = [list(range(100 * i, 100 * i + n)) for i, n in enumerate([5, 17, 1, 40, 9, 23, 2, 8])]


def write(folder, name="train", docs=DOCS, vocab_size=1000, shard_tokens=60, tokenizer="t"):
    writer = ShardWriter(folder, name, vocab_size, shard_tokens=shard_tokens)
    for doc in docs:
        writer.add(doc, n_bytes=len(doc))
    writer.close(bos_token_id=0, eos_token_id=1, tokenizer_sha256=tokenizer, source="test")
    return str(folder / f"{name}.json")


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 99_991])
def test_permutation_is_a_bijection(n):
    assert sorted(permute(np.arange(n), n, (0, 1))) == list(range(n))


def test_permutation_depends_on_its_key_and_not_on_the_batch():
    whole = permute(np.arange(1000), 1000, (3, 4))
    parts = np.concatenate(
        [permute(np.arange(i, i + 10), 1000, (3, 4)) for i in range(0, 1000, 10)]
    )
    assert (whole == parts).all()
    assert (whole != permute(np.arange(1000), 1000, (3, 5))).mean() > 0.9
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.1


def test_permutation_of_a_trillion_tokens_is_cheap_and_unique():
    n = 10**12 // 4096
    drawn = permute(np.arange(100_000), n, (0,))
    assert len(np.unique(drawn)) == 100_000
    assert abs(drawn.mean() / n - 0.5) < 0.01


def test_one_epoch_visits_every_row_once_then_starts_anew():
    order = SampleOrder([100, 37], None, seed=5)
    total = {s: [] for s in (0, 1)}
    source, row = order(np.arange(4096 * 3))
    for s in total:
        total[s] = row[source == s]
        n = order.sizes[s]
        assert sorted(total[s][:n]) == list(range(n))
        assert sorted(total[s][n : 2 * n]) == list(range(n))
        assert (total[s][:n] != total[s][n : 2 * n]).any()


@pytest.mark.parametrize(
    "weights, sources, rows",
    [
        (None, [0, 0, 0, 1, 1, 1, 1, 1], [30, 48, 60, 14, 22, 53, 68, 67]),
        ([1, 3], [0, 1, 0, 1, 1, 0, 1, 1], [16, 2, 34, 65, 6, 42, 28, 58]),
    ],
)
def test_the_order_stays_that_of_earlier_versions(weights, sources, rows):
    """Otherwise a run that is resumed with a newer one would read some rows again, others never."""
    source, row = SampleOrder([64, 70], weights, seed=7)(np.arange(5000, 5008))
    assert source.tolist() == sources and row.tolist() == rows


def test_with_weights_the_rows_of_a_source_come_once_over_many_blocks():
    order = SampleOrder([5000, 9000], [1, 1], seed=0)
    source, row = order(np.arange(3 * 4096))
    for s, size in enumerate([5000, 9000]):
        first = row[source == s][:size]
        assert len(np.unique(first)) == len(first) >= 5000


def test_weights_are_kept_in_every_block():
    order = SampleOrder([10_000, 10, 500], [0.7, 0.2, 0.1], seed=0)
    for block in range(3):
        source, _ = order(np.arange(block * 4096, (block + 1) * 4096))
        assert np.bincount(source) / 4096 == pytest.approx([0.7, 0.2, 0.1], abs=1 / 4096)


def test_no_source_is_left_out():
    """However small beside the largest; and no more are taken than each can have a place."""
    # what rounding leaves goes to the largest remainder
    assert SampleOrder([1] * 3, [1, 2, 4], seed=0).quota.tolist() == [585, 1170, 2341]
    for weights in ([10**9, 1, 1, 1], [10**9, *[10] * 20], [1] * 4096, [5, 10**7, 5]):
        quota = SampleOrder([1] * len(weights), weights, seed=0).quota
        assert quota.min() == 1 and quota.sum() == 4096
    with pytest.raises(InputError, match="at most 4,096 sources, got 4,097"):
        SampleOrder([1] * 4097, [1.0] * 4097, seed=0)


def test_without_weights_no_row_comes_again_before_all_have_come():
    """Also of a source that is a millionth of the data."""
    sizes = [10, 50_000, 1]
    order = SampleOrder(sizes, None, seed=3)
    rows = np.stack(order(np.arange(2 * sum(sizes))), axis=1).tolist()
    every = [[s, row] for s, size in enumerate(sizes) for row in range(size)]
    first, second = rows[: sum(sizes)], rows[sum(sizes) :]
    assert sorted(first) == sorted(second) == every
    assert first != second
    # one source comes as it did alone
    alone = SampleOrder([7], [1.0], seed=3)(np.arange(20))
    assert np.array_equal(SampleOrder([7], None, seed=3)(np.arange(20)), alone)


def test_rows_tile_every_shard_and_positions_restart_at_documents(tmp_path):
    shards = TokenShards(write(tmp_path))
    rows = ConcatRows(shards, 8, keep_tail=True)
    read = [RowReader(rows, mask_doc_start=False)(i) for i in range(len(rows))]
    ids = np.concatenate([r[0][r[1] >= 0] for r in read]).tolist()
    flat = [shards.read(i, 0, s.n_tokens)[:-1] for i, s in enumerate(shards.manifest.shards)]
    assert ids == np.concatenate(flat).tolist()
    # ids of a document count up from a multiple of 100: positions follow unless it began earlier
    for row in read:
        document = row[0] // 100
        for d in np.unique(document[row[1] >= 0]):
            inside = (document == d) & (row[1] >= 0)
            assert np.diff(row[2][inside]).tolist() == [1] * (inside.sum() - 1)
            assert row[2][inside][0] == 0


def test_first_token_of_a_document_is_not_predicted(tmp_path):
    shards = TokenShards(write(tmp_path))
    rows = ConcatRows(shards, 8, keep_tail=True)
    labels = [RowReader(rows, mask_doc_start=True)(i)[1] for i in range(len(rows))]
    predicted = np.concatenate(labels)
    predicted = predicted[predicted >= 0]
    assert (predicted % 100 != 0).all()
    assert len(predicted) == sum(len(d) - 1 for d in DOCS)


def test_a_row_takes_a_few_entries_of_the_index(tmp_path):
    """The one of a full shard is megabytes, and a row wants a page of it."""
    shards = TokenShards(write(tmp_path, docs=[[1, 2]] * 50_000, shard_tokens=100_000))
    read = RowReader(ConcatRows(shards, 64), mask_doc_start=True)
    read(0)
    tracemalloc.start()
    try:
        read(700)
        assert tracemalloc.get_traced_memory()[1] < shards.starts[0].nbytes / 4
    finally:
        tracemalloc.stop()


def test_global_batch_is_the_same_for_any_number_of_ranks(tmp_path):
    sources = open_sources((write(tmp_path),))
    config = DataSection(train=("x",), seq_len=8)

    def whole(world, step):
        parts = [
            TrainData(sources, config, rows=8, seed=1, rank=r, world_size=world).batch(8 * step)
            for r in range(world)
        ]
        return [torch.cat(x) for x in zip(*parts, strict=True)]

    for step in range(5):
        for world in (2, 4, 8):
            for a, b in zip(whole(1, step), whole(world, step), strict=True):
                assert torch.equal(a, b)


def evaluator(sources, tokens, ranks=None):
    ranks = ranks or Ranks(0, 1, torch.device("cpu"), mesh=None)
    # the first token of a document is not predicted here, whatever training does
    config = DataSection(train=("x",), seq_len=10, mask_doc_start=False)
    return Evaluator(sources, config, tokens=tokens, micro_batch=2, ranks=ranks)


@pytest.mark.parametrize("tokens", [0, 5, 60, 69])
def test_held_out_rows_of_all_sources_come_in_turn(tmp_path, tokens):
    docs = [DOCS, DOCS[:3], DOCS[3:]]
    sources = [
        TokenShards(write(tmp_path, name, docs=d)) for name, d in zip("abc", docs, strict=True)
    ]
    evaluate = evaluator(sources, tokens)
    expected = [
        reader(i)[0].tolist() for reader in evaluate.readers for i in range(len(reader.rows))
    ]
    if tokens == 5:
        expected = expected[:1]
    elif tokens:
        # the first, the last, and four between
        expected = [expected[round(i * (len(expected) - 1) / 5)] for i in range(6)]
    read = [evaluate._batch(first).input_ids for first in range(0, len(evaluate.rows), 2)]
    assert torch.cat(read).tolist()[: len(expected)] == expected
    assert len(read) == (len(expected) + 1) // 2
    # what other ranks read meanwhile does not count
    assert (evaluate._batch(len(expected)).labels < 0).all()


def test_held_out_documents_of_one_token_are_an_error(tmp_path):
    """They hold nothing to predict."""
    source = TokenShards(write(tmp_path, docs=[[n] for n in range(1, 30)]))
    with pytest.raises(InputError, match="train.json holds no token to predict"):
        evaluator([source], 0)


class Summing(torch.nn.Module):
    """Has the sum of its labels, and a third of each, as its loss."""

    def forward(self, shift_labels, **_):
        assert not self.training
        return SimpleNamespace(loss=(shift_labels.clamp_min(0) * (4 / 3)).sum())


def test_held_out_sums_are_exchanged_once(tmp_path):
    """And on one rank are those of its batches, added in their order."""
    # the token 0 is one like others
    docs = [*DOCS, [900, 0, 0]]
    source = TokenShards(write(tmp_path, docs=docs))

    def evaluated():
        ranks = parallel.start(ParallelSection(), "cpu")
        exchange, exchanges = torch.distributed.all_reduce, []

        def counted(x, **options):
            exchanges.append(x.tolist())
            return exchange(x, **options)

        torch.distributed.all_reduce = counted
        evaluate, model = evaluator([source], 0, ranks), Summing()
        found = evaluate(model, lambda: False)
        assert model.training
        return found, len(exchanges)

    ((alone, once),) = run_ranks(1, evaluated)
    evaluate = evaluator([source], 0)
    batches = [evaluate._batch(first) for first in range(0, len(evaluate.rows), 2)]
    assert len(batches) > 4 and once == 1
    nats = sum(Summing().eval()(batch.labels).loss.item() for batch in batches)
    predicted = sum(len(doc) - 1 for doc in docs)
    assert alone == (nats / predicted, alone.bits_per_byte, predicted)
    # each token was written with one byte
    assert alone.bits_per_byte == pytest.approx(nats / math.log(2) / sum(map(len, docs)), rel=1e-12)
    first, second = run_ranks(2, evaluated)
    assert first == second and second[1] == 1
    assert second[0] == pytest.approx(alone, rel=1e-12)


def test_an_evaluation_that_is_told_to_stop_ends_after_its_batch(tmp_path):
    evaluate, model, asked = evaluator([TokenShards(write(tmp_path))], 0), Summing(), []
    assert evaluate(model, lambda: asked.append(len(asked)) or True) is None
    assert asked == [0] and model.training


def test_held_out_rows_are_not_listed(tmp_path, monkeypatch):
    source = TokenShards(write(tmp_path))
    monkeypatch.setattr(ConcatRows, "__len__", lambda self: 1_000_000)
    tracemalloc.start()
    evaluate = evaluator([source], 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(evaluate.rows) == 1_000_000 and most < 1e6


def test_seq_len_beyond_the_shard_is_an_error(tmp_path):
    shards = TokenShards(write(tmp_path))
    with pytest.raises(InputError, match="data.seq_len = 64 needs a shard of 65 tokens, got 63"):
        ConcatRows(shards, 64)
    # a shorter row may be the only one, but has a label
    lone = TokenShards(write(tmp_path, "lone", docs=[[7]]))
    with pytest.raises(InputError, match="data.seq_len = 64 needs a shard of 2 tokens, got 1"):
        ConcatRows(lone, 64, keep_tail=True)


def test_sources_must_share_a_tokenizer(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b", tokenizer="other")
    with pytest.raises(InputError, match="b.json must have tokenizer_sha256 t as"):
        open_sources((str(tmp_path / "*.json"),))
    larger = write(tmp_path / "larger", vocab_size=2000)
    with pytest.raises(InputError, match="train.json must have vocab_size 1000 as"):
        open_sources((str(tmp_path / "a.json"), larger))
    with pytest.raises(InputError, match="one manifest an entry, got 2"):
        open_sources((str(tmp_path / "*.json"),), weighted=True)
    with pytest.raises(InputError, match="no token shards at"):
        open_sources((str(tmp_path / "c.json"),))


def test_a_source_named_twice_is_refused(tmp_path):
    path = write(tmp_path, "a")
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (path, str(tmp_path / "*.json"), str(tmp_path / "link" / "a.json")):
        with pytest.raises(InputError, match="a.json is named twice"):
            open_sources((path, other))


def test_a_name_with_brackets_is_a_name(tmp_path):
    path = write(tmp_path / "run[1] a")
    assert [str(source.path) for source in open_sources((path,))] == [path]


def test_prefetcher_follows_jumps_and_raises_at_the_step():
    def load(first):
        if first == 50:
            raise ValueError("bad shard at sample 50")
        return first

    data = Prefetcher(load, stride=10)
    asked = [0, 10, 30, 10, 20, 30, 40]
    assert [data.get(first) for first in asked] == asked
    with pytest.raises(ValueError, match="sample 50"):
        data.get(50)
    data.close()


def test_best_fit_keeps_documents_whole_and_wastes_little(tmp_path):
    rng = np.random.default_rng(0)
    docs = [[1] + [5] * int(n) for n in rng.integers(1, 40, 300)] + [[1] + [5] * 70]
    shards = TokenShards(write(tmp_path, docs=docs, shard_tokens=1000))
    rows = BestFitRows(shards, 32)
    windows = [w for row in range(len(rows)) for w in rows.windows(row)]
    covered = sorted((w.shard, w.start + i) for w in windows for i in range(w.length))
    assert covered == [
        (s, i) for s, f in enumerate(shards.manifest.shards) for i in range(f.n_tokens)
    ]
    assert all(sum(w.length for w in rows.windows(r)) <= 32 for r in range(len(rows)))
    # and within a row stay in the order of the source
    for row in range(len(rows)):
        places = [(w.shard, w.start) for w in rows.windows(row)]
        assert places == sorted(places)
    whole = {(w.shard, w.start): w.length for w in windows}
    for shard, starts in enumerate(shards.starts):
        ends = [*starts[1:].tolist(), shards.manifest.shards[shard].n_tokens]
        for start, end in zip(starts.tolist(), ends, strict=True):
            assert whole[shard, start] == min(32, end - start)
    assert shards.manifest.n_tokens / (32 * len(rows)) > 0.97


def test_best_fit_rows_predict_inside_their_documents_only(tmp_path):
    shards = TokenShards(write(tmp_path))
    reader = RowReader(BestFitRows(shards, 16), mask_doc_start=True)
    predicted = 0
    for row in range(len(reader.rows)):
        ids, labels, positions = reader(row)
        due = labels >= 0
        predicted += due.sum()
        assert (labels[due] == ids[due] + 1).all()
        assert positions[0] == 0
        # padding is one document, not as many as it has tokens
        used = sum(window.length for window in reader.rows.windows(row))
        assert positions[used:].tolist() == list(range(16 - used))
    assert used < 16
    assert predicted == sum(len(d) - 1 for d in DOCS)


def test_best_fit_prefers_the_fullest_row():
    assert best_fit(np.array([6, 7, 3, 4]), 10).tolist() == [1, 0, 0, 1]


def test_the_rows_of_best_fit_stay_those_of_earlier_versions():
    """On every processor, where many rows would do: otherwise ranks would not plan the same, and a
    run that is resumed would read some documents again, others never."""
    rows = best_fit(np.tile([7, 3], 50), 10)
    assert rows[::2].tolist() == list(range(50)) and rows[1::2].tolist() == list(range(49, -1, -1))
