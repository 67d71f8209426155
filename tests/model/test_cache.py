"""Caches that are forked, reordered, rolled back, reset or static, and what generate() does."""

import contextlib
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from rodimus import RodimusConfig, modeling_rodimus
from rodimus.modeling_rodimus import RodimusFullLayer, RodimusSlidingLayer
from tests.device import ON_BOTH, here
from tests.model.golden_data import l2_error, relative_max_error
from tests.model.helpers import (
    NO_ROLLBACK,
    ONE_KIND,
    build,
    cache_bytes,
    config_of,
    enliven,
    model_of,
    random_ids,
)
from tests.model.ways import (
    BOUND,
    SHARE,
    TABLE,
    full,
    in_pieces,
    padded_batch,
    rows_alone,
)

pytestmark = ON_BOTH

PROMPTS = [2, 7, 30]


def prefill(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).past_key_values


@torch.no_grad()
def test_a_batch_may_be_empty(model):
    """With a cache as without one, as the operators take it."""
    ids = random_ids(2, 14)[:0]
    pieces = in_pieces(model, ids, [7, 5, 1, 1])
    assert pieces.shape == full(model, ids).shape == (0, 14, model.config.vocab_size)


# --------------------------------------------------------------------------------- two names


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_has_two_names_in_every_version(model, name):
    """transformers 5.24 renamed it; an exported folder is loaded by whatever is installed."""
    ids = random_ids(2, 12)
    cache = prefill(model, ids[:, :7])
    with torch.no_grad():
        out = model(ids[:, 7:], use_cache=True, **{name: cache})
        assert relative_max_error(out.logits, full(model, ids)[:, 7:]) < BOUND
        assert out[modeling_rodimus.CACHE_NAME] is cache
        base = model.model(ids[:, :7], **{name: DynamicCache(config=model.config)})
    assert base[modeling_rodimus.CACHE_NAME].get_seq_length() == 7


def test_generate_gives_every_token_the_cache(model, monkeypatch):
    """By whichever name; without one the first token alone would be right."""
    ids, read = random_ids(2, 12), []
    embed = type(model.model)._embed
    monkeypatch.setattr(
        type(model.model), "_embed", lambda self, x: read.append(x.shape[1]) or embed(self, x)
    )
    found = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert read == [12, *[1] * 7]
    assert torch.equal(found[:, 12:], full(model, found)[:, 11:-1].argmax(-1))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_goes_on_with_a_cache(model, name):
    """By the names that the installed version knows; it would read the prompt again by another."""
    ids, options = random_ids(2, 12), {"max_new_tokens": 8, "do_sample": False}
    cache = {name: prefill(model, ids[:, :9])}
    if name == "cache" != modeling_rodimus.CACHE_NAME:
        with pytest.raises(ValueError, match=r"got cache and past_key_values.* takes past_key"):
            model.generate(ids, **options, **cache)
        return
    assert torch.equal(model.generate(ids, **options, **cache), model.generate(ids, **options))


# ----------------------------------------------------------------------------- keys of a window


@pytest.mark.parametrize("sizes", [(5, 1, 20), (20, 1, 1), (1, 1, 9), (8, 8)], ids=str)
def test_window_of_keys_is_that_of_transformers(sizes):
    ours, theirs = RodimusSlidingLayer(8), LinearAttentionAndSlidingWindowAttentionLayer(8)
    for size in sizes:
        k, v = (here(torch.randn(2, 1, size, width)) for width in (3, 6))
        assert all(map(torch.equal, ours.update(k, v), theirs.update(k, v)))
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    assert torch.equal(ours._sliding_window_tensor, theirs._sliding_window_tensor)


def test_a_prompt_that_fits_is_not_copied_into_the_window():
    layer = RodimusSlidingLayer(8)
    k, v = (here(torch.randn(1, 1, 7, width)) for width in (3, 6))
    assert all(x is y for x, y in zip(layer.update(k, v), (k, v), strict=True))
    assert layer.keys.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


@pytest.mark.parametrize("pieces", [[20], [5, 20], [20, 3], [20, 1, 30]])
def test_a_longer_prompt_is_let_go(pieces):
    """The window must be no view of all that was read."""
    layer = RodimusSlidingLayer(8)
    read = here(torch.randn(1, 1, sum(pieces), 3))
    for piece in read.split(pieces, dim=2):
        layer.update(piece, piece)
    for kept in (layer.keys, layer.values):
        assert torch.equal(kept, read[:, :, -7:])
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


# ----------------------------------------------------------------------------- forks and reordering


def test_forked_cache(model, kind, measure):
    """Two continuations of one prompt do not see each other; nor does the prompt's own cache."""
    ids = random_ids(2, 30)
    others = torch.cat((ids[:, :17], random_ids(2, 13, seed=2)), 1)
    cache = prefill(model, ids[:, :17])
    fork = copy.deepcopy(cache)
    for row, own in ((others, fork), (ids, cache)):
        logits = in_pieces(model, row[:, 17:], [1, 1, 3, 8], cache=own)
        error = relative_max_error(logits, full(model, row)[:, 17:])
        measure(TABLE, "forked cache (copy.deepcopy)", kind, error, BOUND)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("before", [0, 9])
def test_a_cache_read_in_inference_mode_goes_on_outside(model, kind, before, static, measure):
    """A prefix may be read in it, from the start or after something else; ``generate`` runs
    outside. A fork may, too."""
    ids = random_ids(2, 30)
    options = {"max_cache_len": 64} if static else {}
    cache = (StaticCache if static else DynamicCache)(config=model.config, **options)
    logits = [in_pieces(model, ids[:, :before], [before], cache=cache)] if before else []
    with torch.inference_mode():
        logits.append(in_pieces(model, ids[:, before:13], [12 - before, 1], cache=cache))
    fork = copy.deepcopy(cache)
    for own in (cache, fork):
        rest = in_pieces(model, ids[:, 13:], [1, 1, 10, 1, 4], cache=own)
        error = relative_max_error(torch.cat((*logits, rest), 1), full(model, ids))
        measure(TABLE, "cache read in inference mode", kind, error, BOUND)


MOVES = {
    "reset": lambda cache: cache.reset(),
    "crop": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(here(torch.tensor([1, 0]))),
}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("move", MOVES)
def test_a_cache_read_in_inference_mode_is_moved_outside(model, move, static):
    options = {"max_cache_len": 64} if static else {}
    cache = (StaticCache if static else DynamicCache)(config=model.config, **options)
    ids = random_ids(2, 30)
    cache.activate_past_recording()
    with torch.inference_mode():
        prefill(model, ids[:, :13], cache)
    if not cache.is_croppable and move == "crop":
        with pytest.raises(RuntimeError, match="cannot be rolled back"):
            MOVES[move](cache)
        return
    MOVES[move](cache)
    rows = ids.flip(0) if move == "reorder" else ids
    read = {"reset": 0, "crop": 10, "reorder": 13}[move]
    assert cache.get_seq_length() == read
    rest = in_pieces(model, rows[:, read:], [1, 29 - read], cache=cache)
    assert relative_max_error(rest, full(model, rows)[:, read:]) < BOUND


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("first", [False, True], ids=["into autocast", "out of autocast"])
def test_a_cache_goes_on_in_and_out_of_autocast(model, first, static):
    """Keys and values are kept as they were read first."""
    options = {"max_cache_len": 64} if static else {}
    cache = (StaticCache if static else DynamicCache)(config=model.config, **options)
    ids, logits = random_ids(2, 24), []
    for start, is_on in ((0, first), (8, not first), (16, first)):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=is_on):
            logits.append(in_pieces(model, ids[:, start : start + 8], [6, 1, 1], cache=cache))
    exact = full(model, ids)
    with torch.autocast(ids.device.type, torch.bfloat16):
        rounded = full(model, ids)
    error = l2_error(torch.cat([x.float() for x in logits], 1), exact)
    assert error < SHARE * l2_error(rounded, exact)


@pytest.mark.parametrize("length", PROMPTS)
def test_reordered_cache(model, kind, length, measure):
    ids = random_ids(3, length + 6)
    order = here(torch.tensor([2, 0, 0]))
    cache = prefill(model, ids[:, :length])
    cache.reorder_cache(order)
    logits = in_pieces(model, ids[order, length:], [1, 2, 3], cache=cache)
    error = relative_max_error(logits, full(model, ids[order])[:, length:])
    measure(TABLE, "reordered cache", kind, error, BOUND)


@pytest.mark.parametrize("length", PROMPTS)
def test_repeated_and_selected_cache(model, kind, length, measure):
    """``batch_repeat_interleave`` and ``batch_select_indices`` move states with keys and values."""
    ids = random_ids(2, length + 4)
    cache = prefill(model, ids[:, :length])
    cache.batch_repeat_interleave(2)
    rows = ids.repeat_interleave(2, 0)
    logits = in_pieces(model, rows[:, length : length + 2], [1, 1], cache=cache)
    error = relative_max_error(logits, full(model, rows)[:, length : length + 2])
    measure(TABLE, "batch_repeat_interleave", kind, error, BOUND)
    cache.batch_select_indices(here(torch.tensor([3, 0])))
    rows = rows[[3, 0]]
    logits = in_pieces(model, rows[:, length + 2 :], [1, 1], cache=cache)
    error = relative_max_error(logits, full(model, rows)[:, length + 2 :])
    measure(TABLE, "batch_select_indices", kind, error, BOUND)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_reset_and_reused_cache(model, kind, static, measure):
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    cache = prefill(model, random_ids(2, 30, seed=2), cache)
    prefill(model, random_ids(2, 1, seed=3), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert static or "window" not in cache_bytes(cache)
    ids = random_ids(2, 30)
    logits = in_pieces(model, ids, [2, 17, 1, 1, 9], cache=cache)
    name = f"reset and reused {'static' if static else 'dynamic'} cache"
    measure(TABLE, name, kind, relative_max_error(logits, full(model, ids)), BOUND)


def test_length_counts_every_token(model):
    cache = prefill(model, random_ids(2, 30))
    assert cache.get_seq_length() == 30
    prefill(model, random_ids(2, 3), cache)
    assert cache.get_seq_length() == 33


def test_bytes_do_not_grow_past_the_window(model):
    ids = random_ids(2, 60)
    cache = prefill(model, ids[:, :20])
    # the ring of fused steps has room for the newest token as well
    cache = prefill(model, ids[:, 20:21], cache)
    before = cache_bytes(cache)
    for token in ids[:, 21:].T:
        cache = prefill(model, token[:, None], cache)
    assert cache_bytes(cache) == before != {}
    del cache
    whole = cache_bytes(prefill(model, ids))
    assert sum(whole.values()) <= sum(before.values())
    if "window" in whole:
        seen = model.config.sliding_window
        assert before["window"] <= whole["window"] * seen / (seen - 1)


def test_state_stays_in_place(model):
    """A step writes the state where it lies: no new tensor a token, as CUDA graphs need."""
    ids = random_ids(2, 14)
    cache = prefill(model, ids[:, :12])
    pointers = [layer.recurrent_states[0].data_ptr() for layer in cache.layers]
    for token in ids[:, 12:].T:
        prefill(model, token[:, None], cache)
    assert [layer.recurrent_states[0].data_ptr() for layer in cache.layers] == pointers


def test_forward_leaves_no_trace_in_the_model(model):
    """Caches live outside: the state dict after decoding has the same names as before."""
    before = set(model.state_dict())
    buffers = {name for name, _ in model.named_buffers()}
    prefill(model, random_ids(2, 5), prefill(model, random_ids(2, 30)))
    assert set(model.state_dict()) == before
    assert {name for name, _ in model.named_buffers()} == buffers


# ---------------------------------------------------------------------------------------- rollback


@pytest.mark.parametrize("drop", [1, 3, 6])
@pytest.mark.parametrize("length", PROMPTS)
def test_rolled_back_cache(model, kind, length, drop, measure):
    """Six guessed tokens, the last ``drop`` of them refused, twice in a row."""
    ids = random_ids(2, length + 20)
    cache = DynamicCache(config=model.config)
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    cache = prefill(model, ids[:, :length], cache)
    at, worst = length, 0.0
    for round_ in range(2):
        guess = ids[:, at : at + 6].clone()
        guess[:, 6 - drop :] = random_ids(2, drop, seed=3 + round_)
        prefill(model, guess, cache)
        cache.crop(-drop)
        at += 6 - drop
        assert cache.get_seq_length() == at
        fork = copy.deepcopy(cache)
        logits = in_pieces(model, ids[:, at : at + 3], [1, 2], cache=fork)
        expected = full(model, ids[:, : at + 3])[:, at:]
        worst = max(worst, relative_max_error(logits, expected))
    measure(TABLE, "rolled back cache", kind, worst, BOUND)


def test_a_cache_without_a_window_is_rolled_back():
    config = config_of("rodimus_plus")
    config["attn_cfg"] |= {"window_size": None}
    model, ids = build(config), random_ids(2, 24)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    prefill(model, ids[:, :20], cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 15
    rest = in_pieces(model, ids[:, 15:], [1, 8], cache=cache)
    assert relative_max_error(rest, full(model, ids)[:, 15:]) < BOUND


# ------------------------------------------------------------------------------------- static cache


@pytest.mark.parametrize("read", [[], [5], [3, 200]], ids=str)
def test_a_long_prompt_that_is_recorded_is_let_go(model, read):
    """Speculative decoding after a prompt of any length needs its last tokens alone."""
    held, later = [], random_ids(1, 6, seed=9)
    for length, removed in ((300, 128), (900, 5)):
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        ids = random_ids(1, sum(read) + length)
        for piece in ids.split([*read, length], dim=1):
            prefill(model, piece, cache)
        held.append(cache_bytes(cache))
        cache.crop(-removed)
        expected = full(model, torch.cat((ids[:, :-removed], later), 1))[:, -6:]
        assert relative_max_error(in_pieces(model, later, [6], cache=cache), expected) < BOUND
    assert held[0] == held[1]


@pytest.fixture
def few_recorded(monkeypatch):
    """So many tokens can be taken back, more than a window has."""
    monkeypatch.setattr(modeling_rodimus._RecurrentCacheLayer, "max_rollback", 12)
    return 12


# with the last token, the oldest are let go once more
@pytest.mark.parametrize("first, more", [(1, 63), (40, 65)])
def test_what_is_recorded_token_by_token_is_let_go(model, first, more, few_recorded):
    """A cache that speculative decoding leaves behind goes on recording in later calls."""
    most, later, held = few_recorded, random_ids(1, 6, seed=9), []
    ids = random_ids(1, first + more)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    cache = prefill(model, ids[:, :first], cache)
    for token in ids[:, first:].split(1, dim=1):
        prefill(model, token, cache)
        held.append(sum(cache_bytes(cache).values()))
    assert max(held[4 * most :]) <= max(held[: 4 * most])
    assert held[-1] == min(held[4 * most :])
    for removed in (most, 5):
        fork = copy.deepcopy(cache)
        fork.crop(-removed)
        expected = full(model, torch.cat((ids[:, :-removed], later), 1))[:, -6:]
        assert relative_max_error(in_pieces(model, later, [6], cache=fork), expected) < BOUND


@pytest.mark.parametrize("sizes", [[1] * 33, [9, 12]], ids=["tokens", "pieces"])
def test_all_that_is_recorded_can_be_taken_back(model, sizes, few_recorded):
    """The keys of a window are let go at another token than the states, and never before them."""
    ids, later = random_ids(1, sum(sizes)), random_ids(1, 6, seed=9)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for piece in ids.split(sizes, dim=1):
        prefill(model, piece, cache)
    held = cache.layers[0].recorded[0].shape[1]
    assert held > few_recorded
    cache.crop(-held)
    expected = full(model, torch.cat((ids[:, :-held], later), 1))[:, -6:]
    assert relative_max_error(in_pieces(model, later, [6], cache=cache), expected) < BOUND


@pytest.mark.parametrize(
    "sizes", [[1] * 40, [30] + [1] * 10, [7] + [1] * 33, [5, 20, 1, 1, 13]], ids=str
)
@pytest.mark.parametrize("tile", [1, 64])
def test_static_cache(model, kind, sizes, tile, measure, monkeypatch):
    """Prompts shorter and longer than the window, then steps and pieces past it; in a ring that
    wraps at once and in one that does not."""
    monkeypatch.setattr(modeling_rodimus, "RING_TILE", tile)
    ids = random_ids(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=64)
    error = relative_max_error(in_pieces(model, ids, sizes, cache=cache), full(model, ids))
    measure(TABLE, "static cache", kind, error, BOUND)


@pytest.mark.parametrize(
    "sizes", [[24] + [1] * 8, [2, 3, 19, 5, 1, 1, 1], [12, 14, 1, 1, 4], [1] * 32], ids=str
)
def test_static_cache_after_left_padding(model, kind, sizes, measure, monkeypatch):
    """Rows of different ages, also where a row's first pieces are padding alone."""
    monkeypatch.setattr(modeling_rodimus, "RING_TILE", 1)
    ids, mask = padded_batch("left", tail=8)
    cache = StaticCache(config=model.config, max_cache_len=64)
    logits = in_pieces(model, ids, sizes, cache=cache, mask=mask)
    error = relative_max_error(logits[mask.bool()], rows_alone(model, ids, mask))
    measure(TABLE, "static cache, left padding", kind, error, BOUND)


def test_rows_of_a_static_cache_are_reordered_with_their_ages(model):
    """And a reset leaves nothing behind, not even NaN."""
    ids, mask = padded_batch("left", tail=8)
    order = here(torch.arange(len(ids)).roll(1))
    cache = StaticCache(config=model.config, max_cache_len=64)
    prefill(model, ids, cache)
    for layer in cache.layers:
        if layer.ring is not None:
            layer.ring.fill_(float("nan"))
    cache.reset()
    # a row's first pieces are padding alone: those after them read places that hold nothing yet
    in_pieces(model, ids[:, :24], [5, 7, 12], cache=cache, mask=mask[:, :24])
    with torch.no_grad():
        cache.reorder_cache(order)
        ids, mask, logits = ids[order], mask[order], []
        for end in range(25, 33):
            out = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(out.logits)
    for row, real in enumerate(mask.bool()):
        expected = full(model, ids[row : row + 1, real])[0, -8:]
        assert relative_max_error(torch.cat(logits, 1)[row], expected) < BOUND


@pytest.mark.parametrize(
    "sizes", [[24] + [1] * 8, [24, 3, 3, 2], [5, 7, 12, 8], [2] * 16, [1] * 32], ids=str
)
@pytest.mark.parametrize("padding", ["right", "both", "interior"])
def test_static_cache_with_padding_between_turns(padding, sizes, measure):
    """A state does not know where its tokens stood; of a window, whose keys would have to move, it
    is refused."""
    model = model_of("rodimus")
    ids, mask = padded_batch(padding, tail=8)
    cache = StaticCache(config=model.config, max_cache_len=64)
    logits = in_pieces(model, ids, sizes, cache=cache, mask=mask)
    error = relative_max_error(logits[mask.bool()], rows_alone(model, ids, mask))
    measure(TABLE, f"static cache, {padding} padding", "rodimus", error, BOUND)


def test_a_static_window_takes_no_padding_between_turns():
    model = model_of("rodimus_plus")
    ids, mask = padded_batch("right", tail=8)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="padding after cached tokens needs a dynamic cache"):
        in_pieces(model, ids, [5, 7, 12, 8], cache=cache, mask=mask)


def contents(cache):
    """``(addresses of all tensors, everything else)`` that the layers of a cache hold."""
    tensors, others = [], []
    for layer in cache.layers:
        for name, value in sorted({**vars(layer), **vars(layer.read)}.items()):
            for found in value.values() if isinstance(value, dict) else [value]:
                if isinstance(found, torch.Tensor):
                    tensors.append(found.data_ptr())
                elif not hasattr(found, "__dict__"):
                    others.append((name, found))
    return tensors, others


class NothingAsked(TorchDispatchMode):
    """Fails where a value of a tensor is brought to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "asked for a value"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("native", [True, False], ids=["fused", "modules"])
def test_a_static_step_can_be_recorded(model, monkeypatch, native):
    """What a CUDA graph replays is all there is: no tensor is replaced, nothing is counted or
    asked on the host, so a step while a graph is recorded goes on from the one before it."""
    if not native:
        monkeypatch.setattr(modeling_rodimus, "blocks_step", None)
    ids = random_ids(2, 40)
    cache = prefill(model, ids[:, :12], StaticCache(config=model.config, max_cache_len=64))
    logits = [in_pieces(model, ids[:, 12:13], [1], cache=cache)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = contents(cache)
    with NothingAsked():
        logits += [in_pieces(model, ids[:, i : i + 1], [1], cache=cache) for i in range(13, 40)]
    assert contents(cache) == before and len(before[0]) > 3 * model.config.n_layer
    error = relative_max_error(torch.cat(logits, 1), full(model, ids)[:, 12:])
    assert error < BOUND


def test_rows_of_a_recorded_cache_are_reordered_and_rolled_back(model):
    ids, order = random_ids(3, 24), here(torch.tensor([2, 0, 0]))
    cache = prefill(model, ids[:, :12])
    cache.activate_past_recording()
    for piece in (ids[:, 12:15], ids[:, 15:18]):
        prefill(model, piece, cache)
    cache.reorder_cache(order)
    cache.crop(-4)
    # and steps are fused again
    for layer in cache.layers:
        layer.record_past = False
    rest = in_pieces(model, ids[order, 14:], [1, 1, 8], cache=cache)
    assert relative_max_error(rest, full(model, ids[order])[:, 14:]) < BOUND


@pytest.mark.parametrize("removed", [0, 2, 3])
def test_a_text_shorter_than_the_convolution_goes_on_where_nothing_is_recorded(model, removed):
    """As in a cache that assisted generation leaves after a few tokens."""
    ids, read = random_ids(2, 9), 3 - removed
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    prefill(model, ids[:, :3], cache)
    cache.crop(-removed)
    for layer in cache.layers:
        layer.record_past = False
    rest = in_pieces(model, ids[:, read:], [1, 8 - read], cache=cache)
    assert relative_max_error(rest, full(model, ids)[:, read:]) < BOUND


def test_a_long_draft_is_recorded_until_the_next_crop():
    model = model_of("rodimus")
    cache = modeling_rodimus.adopt_cache(DynamicCache(config=model.config))
    most = lambda: {layer.max_rollback for layer in cache.layers}
    modeling_rodimus._record_at_least(cache, 300)
    assert most() == {128}
    cache.activate_past_recording()
    for tokens, expected in ((5, 128), (300, 300), (200, 300)):
        modeling_rodimus._record_at_least(cache, tokens)
        assert most() == {expected}
    # though it has read nothing
    cache.crop(0)
    assert most() == {128}


def test_a_refused_rollback_changes_nothing(model):
    ids = random_ids(1, 20)
    cache = prefill(model, ids[:, :12])
    with pytest.raises(ValueError, match="crop takes minus the tokens to remove, got 3"):
        cache.layers[0].crop(3)
    with pytest.raises(RuntimeError, match="recorded for the last 0 only"):
        cache.crop(-3)
    error = relative_max_error(
        in_pieces(model, ids[:, 12:], [8], cache=cache), full(model, ids)[:, 12:]
    )
    assert error < BOUND


def test_a_length_asked_for_stays_what_it_was(model):
    cache = prefill(model, random_ids(1, 12), StaticCache(config=model.config, max_cache_len=64))
    before = cache.get_seq_length()
    prefill(model, random_ids(1, 3), cache)
    assert (before, cache.get_seq_length()) == (12, 15)


def test_a_static_cache_is_rolled_back_or_refuses_and_stays(model):
    """A ring has lost the tokens that the newest ones overwrote."""
    ids = random_ids(1, 20)
    cache = prefill(model, ids[:, :12], StaticCache(config=model.config, max_cache_len=64))
    has_window = cache.layers[0].is_sliding
    assert cache.is_croppable != has_window
    cache.activate_past_recording()
    prefill(model, ids[:, 12:15], cache)
    read = 15 if has_window else 13
    refused = pytest.raises(RuntimeError, match="static window cannot be rolled back")
    with refused if has_window else contextlib.nullcontext():
        cache.crop(-2)
    for layer in cache.layers:
        layer.crop(0)
    assert cache.get_seq_length() == read
    rest = in_pieces(model, ids[:, read:], [20 - read], cache=cache)
    assert relative_max_error(rest, full(model, ids)[:, read:]) < BOUND


# ---------------------------------------------------------------------------------------- generate


# on a GPU transformers compiles the steps of a static cache: test_on_gpu.py does that once
EAGER = {"disable_compile": True}


def generate(model, ids, mask=None, new=12, **options):
    """``(tokens [B, new], logits [B, new, vocab])`` of a greedy continuation."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new,
        **EAGER | {"do_sample": False} | options,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def greedy_by_full_forward(model, ids, new=12):
    """The definition: a full forward over everything so far, for each token."""
    logits = []
    for _ in range(new):
        logits.append(full(model, ids)[:, -1])
        ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), 1)
    return ids[:, -new:], torch.stack(logits, 1)


GENERATIONS = {
    "generate": {},
    "generate without a cache": {"use_cache": False},
    "generate, static cache": {"cache_implementation": "static"},
    "generate, chunked prefill": {"prefill_chunk_size": 4},
    "generate, static cache, chunked prefill": {
        "cache_implementation": "static",
        "prefill_chunk_size": 4,
    },
    "generate, prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("length", PROMPTS)
def test_generate(model, kind, name, length, measure):
    ids = random_ids(1, length, vocab=12)
    tokens, logits = generate(model, ids, **GENERATIONS[name])
    expected_tokens, expected = greedy_by_full_forward(model, ids)
    assert torch.equal(tokens, expected_tokens)
    measure(TABLE, name, kind, relative_max_error(logits, expected), BOUND)


@pytest.mark.parametrize("length", PROMPTS)
def test_assisted_by_a_draft_that_disagrees(model, kind, length, measure):
    """Refused guesses roll the state back: tokens and logits are those of the model alone."""
    draft = model_of(kind)
    enliven(draft, seed=7)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    ids = random_ids(1, length)
    expected_tokens, expected = greedy_by_full_forward(model, ids, new=20)
    assert (greedy_by_full_forward(draft, ids, new=20)[0] != expected_tokens).any()
    tokens, logits = generate(model, ids, new=20, assistant_model=draft)
    assert torch.equal(tokens, expected_tokens)
    measure(TABLE, "generate, assisted", kind, relative_max_error(logits, expected), BOUND)


def draft_that_often_agrees(kind):
    draft = model_of(kind)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * parameter.std())
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


@pytest.mark.parametrize("length", PROMPTS)
def test_assisted_by_a_draft_that_often_agrees(model, kind, length, measure):
    """Some guesses are taken and some refused: rollback by less than a whole round."""
    ids = random_ids(1, length)
    expected_tokens, expected = greedy_by_full_forward(model, ids, new=20)
    tokens, logits = generate(model, ids, new=20, assistant_model=draft_that_often_agrees(kind))
    assert torch.equal(tokens, expected_tokens)
    measure(TABLE, "generate, assisted", kind, relative_max_error(logits, expected), BOUND)


@ONE_KIND
@pytest.mark.parametrize("by", ["lookup", "model"])
def test_a_draft_longer_than_what_is_recorded_by_itself(model, kind, by, few_recorded):
    """Whoever asks for the logits of a draft may refuse all of it."""
    longer, few = 2 * few_recorded + 44, 3
    ids = random_ids(1, longer + 6)
    options = {"prompt_lookup_num_tokens": longer}
    if by == "lookup":
        # the end is as the beginning: what followed there is the guess
        ids[:, -2:] = ids[:, :2]
    else:
        draft = model_of(kind)
        enliven(draft, seed=7)
        draft.generation_config.num_assistant_tokens = longer
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": draft}

    def enough(tokens, scores):
        return torch.full(tokens.shape[:1], tokens.shape[1] >= ids.shape[1] + few, dtype=torch.bool)

    tokens, _ = generate(model, ids, new=longer + 10, stopping_criteria=[enough], **options)
    assert torch.equal(tokens, greedy_by_full_forward(model, ids, new=tokens.shape[1])[0])


def test_assisted_generation_leaves_a_cache_as_it_was_given(model):
    """What recorded for a draft does not go on: later calls take fused steps again."""
    ids, options = random_ids(1, 12), {"prompt_lookup_num_tokens": 3}
    for recorded in (False, True):
        cache = DynamicCache(config=model.config)
        if recorded:
            cache.activate_past_recording()
        generate(model, ids, **{modeling_rodimus.CACHE_NAME: cache}, **options)
        assert {layer.record_past for layer in cache.layers} == {recorded}


@pytest.mark.parametrize("by", ["lookup", "model"])
def test_assisted_generation_goes_on_from_a_given_cache(model, kind, by):
    """transformers reads the whole conversation in the first round of a draft."""
    ids, options = random_ids(1, 12), {"prompt_lookup_num_tokens": 3}
    if by == "model":
        options = {"assistant_model": draft_that_often_agrees(kind)}
    cache = prefill(model, ids[:, :9])
    tokens, _ = generate(model, ids, **{modeling_rodimus.CACHE_NAME: cache}, **options)
    assert torch.equal(tokens, greedy_by_full_forward(model, ids)[0])


@pytest.mark.parametrize("length", PROMPTS)
def test_assisted_in_a_static_cache(model, kind, length, measure):
    """From transformers 5.24 on, where the cache can be rolled back; an error otherwise."""
    ids = random_ids(1, length)
    options = {"cache_implementation": "static", "assistant_model": draft_that_often_agrees(kind)}
    if modeling_rodimus.CACHE_NAME == "past_key_values" or kind != "rodimus":
        with pytest.raises(ValueError, match=NO_ROLLBACK):
            generate(model, ids, new=20, **options)
        return
    expected_tokens, expected = greedy_by_full_forward(model, ids, new=20)
    tokens, logits = generate(model, ids, new=20, **options)
    assert torch.equal(tokens, expected_tokens)
    error = relative_max_error(logits, expected)
    measure(TABLE, "generate, assisted, static cache", kind, error, BOUND)


def test_generate_on_a_left_padded_batch(model, kind, measure):
    lengths = [20, 11, 2]
    ids = random_ids(3, 20)
    mask = here((torch.arange(20) >= 20 - torch.tensor(lengths)[:, None]).long())
    tokens, logits = generate(model, ids, mask=mask)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, 20 - length :]
        expected_tokens, expected = greedy_by_full_forward(model, alone)
        assert torch.equal(tokens[row : row + 1], expected_tokens)
        error = relative_max_error(logits[row : row + 1], expected)
        measure(TABLE, "generate, left-padded batch", kind, error, BOUND)


def test_a_state_is_never_offloaded(monkeypatch):
    """The mixer reads it before the attention, which waits for what is brought back."""
    layer = RodimusFullLayer()
    layer.update(torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3, 4))
    for name in ("offload", "prefetch"):
        monkeypatch.setattr(LinearAttentionLayer, name, None)
        getattr(layer, name)()


@pytest.mark.parametrize("window", [None, 17])
def test_only_a_cache_that_grows_is_offloaded(window):
    config = config_of("rodimus_plus")
    config["attn_cfg"] |= {"window_size": window}
    cache = DynamicCache(config=RodimusConfig.from_dict(config))
    cache.offloading = True
    assert modeling_rodimus.adopt_cache(cache).offloading == (window is None)


def has_streams():
    try:
        return torch.Stream() is not None
    except RuntimeError:
        return False


@pytest.mark.skipif(not has_streams(), reason="a torch built for GPUs offloads nothing without one")
@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_generate_with_an_offloaded_cache(model, name):
    """There is nothing to offload; transformers looks for a layer to bring back, and finds none."""
    ids = random_ids(2, 12)
    options = EAGER | {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation=name, **options), expected)


@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_beam_search(model, kind, length, cache, measure):
    """With a cache, and so with reordering, beams and scores are those without one."""
    ids = random_ids(2, length)
    beams = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            **EAGER | options,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for options in ({"cache_implementation": cache}, {"use_cache": False})
    ]
    assert torch.equal(beams[0].sequences, beams[1].sequences)
    assert (beams[0].beam_indices[:, :-1] != beams[0].beam_indices[:, 1:]).any()
    error = relative_max_error(beams[0].sequences_scores, beams[1].sequences_scores)
    measure(TABLE, "beam search, scores", kind, error, BOUND)


def test_sampling_repeats_with_the_seed(model):
    ids = random_ids(2, 10)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        runs.append(generate(model, ids, do_sample=True, top_k=0, use_cache=use_cache)[0])
    assert torch.equal(*runs)


def test_generate_from_a_given_cache(model, kind, measure):
    """A conversation: generate, add a turn, generate again with the cache of the first."""
    ids = random_ids(1, 13)
    first = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
    )
    turn = torch.cat((first.sequences, random_ids(1, 5, seed=4)), 1)
    tokens, logits = generate(model, turn, past_key_values=first.past_key_values)
    expected_tokens, expected = greedy_by_full_forward(model, turn)
    assert torch.equal(tokens, expected_tokens)
    measure(TABLE, "generate, second turn", kind, relative_max_error(logits, expected), BOUND)
