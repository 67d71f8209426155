"""One token for many sequences: the model's own modules over the engine's slots.

Adapters, quantised layers and hooks take part because the model is called as it is. On a GPU the
call is captured once per batch size and replayed; on a CPU it runs as it stands.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling_rodimus import NO_PADDING
from .state import SlotStates


class Decoder:
    """Reads the newest token of the first B slots and gives the logits of the next ones.

    Attributes:
        tokens: int64 ``[slots]``: the newest token of each slot, not read yet.
    """

    def __init__(self, model: PreTrainedModel, states: SlotStates, *, cuda_graphs: bool = True):
        self.model, self.states = model, states
        # a wrapper's attributes may be those of the model inside, without what it adds
        self._is_whole = hasattr(type(model), "step")
        device = states.positions.device
        self.tokens = torch.zeros(states.slots, dtype=torch.long, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if cuda_graphs and device.type == "cuda":
            with torch.cuda.device(device):
                self._capture()

    def __call__(self, batch: int) -> Tensor:
        """Logits ``[batch, V]`` after the newest tokens of the ``batch`` slots in use.

        Their states and positions move on by one token.
        """
        for size, (graph, logits) in self._graphs.items():
            if size >= batch:
                graph.replay()
                return logits[:batch]
        return self._forward(batch)

    def _forward(self, batch):
        positions, cache = self.states.positions[:batch], self.states.cache(batch)
        token = (self.tokens[:batch, None], positions[:, None])
        logits = self.model.step(*token, cache) if self._is_whole else None
        if logits is None:
            output = self.model(
                token[0],
                position_ids=token[1],
                attention_mask=NO_PADDING,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits
        positions += 1
        return logits.squeeze(1)

    @torch.no_grad()
    def _capture(self):
        """One graph per power of two up to the number of slots; all share one memory pool.

        Warming up runs the model over empty slots, so it happens before the first sequence. A
        batch between two sizes runs in the larger one: its extra rows are free slots, whose
        content nobody reads and the next sequence overwrites.
        """
        sizes = sorted(
            {*(1 << n for n in range(self.states.slots.bit_length())), self.states.slots}
        )
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        for size in reversed([size for size in sizes if size <= self.states.slots]):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._forward(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # without a stream of ours, all recordings share one on the first device used
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                logits = self._forward(size)
            self._graphs[size] = (graph, logits)
        self._graphs = dict(sorted(self._graphs.items()))
        self.states.clear()
