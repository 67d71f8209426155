"""One token for many sequences: the model's own modules over the engine's slots.

Adapters, quantised layers and hooks take effect because the model itself is called. On a GPU the
call is captured once per batch size and replayed, and captured again when the model has changed; on
a CPU it is not captured.
"""

import logging
from itertools import chain, starmap, zip_longest
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers import PreTrainedModel

from ..modeling_rodimus import NO_PADDING
from .state import SlotStates

logger = logging.getLogger(__name__)


class Decoder:
    """Reads the newest token of the first B slots and returns the logits of the next tokens.

    Attributes:
        tokens: int64 ``[slots]``: the newest token of each slot, not read yet.
    """

    def __init__(self, model: PreTrainedModel, states: SlotStates, *, cuda_graphs: bool = True):
        self.model, self.states = model, states
        # a wrapper's `step` may be that of the model inside, without what the wrapper adds
        self._is_whole = hasattr(type(model), "step")
        device = states.positions.device
        self.tokens = torch.zeros(states.slots, dtype=torch.long, device=device)
        # by batch size: views of the tokens and the positions
        self._inputs: dict[int, tuple[Tensor, ...]] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._captured: _Contents | None = None
        if cuda_graphs and device.type == "cuda":
            self._capture()

    def follow_model(self, *, is_idle: bool) -> None:
        """Drop captured steps if the model has changed since: they do not reflect new adapters,
        hooks, modules, attributes or replaced weights. They do reflect weights written in place.

        Args:
            is_idle: No slot is in use, so the step may be captured again. Until then it runs
                without capture.
        """
        if self._captured is None:
            return
        if self._graphs and not self._captured.is_unchanged():
            logger.warning("the model has changed since its decode step was captured")
            self._graphs = {}
        if not self._graphs and is_idle:
            self._capture()

    def __call__(self, batch: int) -> Tensor:
        """Logits ``[batch, V]`` after the newest tokens of the ``batch`` slots in use.

        Their states and positions advance by one token.
        """
        for size, (graph, logits) in self._graphs.items():
            if size >= batch:
                graph.replay()
                return logits[:batch]
        return self._forward(batch)

    def _forward(self, batch):
        if batch not in self._inputs:
            positions = self.states.positions[:batch]
            self._inputs[batch] = self.tokens[:batch, None], positions[:, None], positions
        tokens, position_ids, positions = self._inputs[batch]
        cache = self.states.cache(batch)
        logits = self.model.step(tokens, position_ids, cache) if self._is_whole else None
        if logits is None:
            output = self.model(
                tokens,
                position_ids=position_ids,
                attention_mask=NO_PADDING,
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits
        positions += 1
        return logits.squeeze(1)

    @torch.no_grad()
    def _capture(self):
        """One graph per power of two up to the number of slots.

        Warming up runs the model over empty slots, so no sequence may be in one. A batch between
        two sizes runs in the larger one: its extra rows are free slots, whose content nobody reads
        and the next sequence overwrites.
        """
        slots = self.states.slots
        sizes = sorted({*(1 << n for n in range(slots.bit_length())), slots})
        self._graphs = self._record(sizes)
        self._captured = _Contents(self.model)
        self.states.clear()

    def _record(self, sizes):
        """The graph of each size, and the logits that it writes; all share one memory pool."""
        graphs = {}
        with torch.cuda.device(self.tokens.device):
            pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()
            for size in reversed(sizes):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        self._forward(size)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                # without a stream of ours, all captures share one on the first device used
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    logits = self._forward(size)
                graphs[size] = (graph, logits)
        return dict(sorted(graphs.items()))


_NOTHING = object()
_VALUES = (bool, int, float, str)


class _Contents:
    """A snapshot of what a model consists of, to see whether a captured call still matches it.

    The memory of its weights is kept, so that a captured call never reads freed memory."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._look()
        self._deciding = self._what_decides()
        # tensors that wrap others have no address; they are never replaced in place
        self._tensors = [x for x in self._held if type(x) in (Tensor, nn.Parameter)]
        self._memory = [x.detach() for x in self._tensors]

    def is_unchanged(self) -> bool:
        """Whether every part, weight, hook and setting is unchanged, and in the same memory."""
        found = zip_longest(chain.from_iterable(self._views), self._held, fillvalue=_NOTHING)
        if not all(starmap(is_, found)):
            now = zip_longest(self._what_decides(), self._deciding, fillvalue=_NOTHING)
            if not all(starmap(_is_same, now)):
                return False
            self._look()
        return all(
            x.data_ptr() == kept.data_ptr()
            for x, kept in zip(self._tensors, self._memory, strict=True)
        )

    def _look(self):
        """Remember all values, so that comparing them later takes half a millisecond."""
        self._views = list(self._all_values())
        self._held = list(chain.from_iterable(self._views))

    def _all_values(self):
        attributes = [vars(part) for part in self.model.modules()]
        yield from map(dict.values, attributes)
        # modules, parameters, buffers and hooks, and the settings of adapters
        for value in chain.from_iterable(map(dict.values, attributes)):
            if isinstance(value, dict):
                yield value.values()
            elif isinstance(value, list):
                yield value
        yield module_hooks._global_forward_pre_hooks.values()
        yield module_hooks._global_forward_hooks.values()

    def _what_decides(self):
        """All values but None and objects that merely cache something, such as an inspection."""
        kinds = (*_VALUES, Tensor, nn.Module)
        values = chain.from_iterable(self._all_values())
        return [x for x in values if isinstance(x, kinds) or callable(x)]


def _is_same(a, b) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _VALUES) and a == b)
