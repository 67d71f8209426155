"""A server's metrics for Prometheus: the engine's counters, and how long requests take."""

from ..errors import InputError
from .engine import Generation
from .worker import EngineWorker

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.exposition import generate_latest
except ImportError as error:
    raise InputError(
        f'metrics need more packages ({error}): in a checkout, pip install ".[serve]"'
    ) from error

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The metrics of one worker, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, worker: EngineWorker):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(worker))
        self._requests = Counter(
            "rodimus_http_requests",
            "Requests answered, by endpoint and status",
            ("endpoint", "status"),
            registry=self.registry,
        )
        self._first = Histogram(
            "rodimus_time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._whole = Histogram(
            "rodimus_generation_seconds",
            "From arrival to the last token",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self.registry)

    def count_request(self, endpoint: str, status: int) -> None:
        """Count an answer."""
        self._requests.labels(endpoint, str(status)).inc()

    def observe(self, generations: list[Generation], arrived: float) -> None:
        """Record how long a request's generations took since it ``arrived`` (in seconds of
        ``time.perf_counter``), tokenising included. Clients that left count too, because long
        times may be why they left."""
        for generation in generations:
            if generation.started is not None:
                self._first.observe(generation.started - arrived)
            is_whole = generation.finish_reason in ("stop", "length")
            if is_whole and generation.finished is not None:
                self._whole.observe(generation.finished - arrived)


class _EngineCollector:
    """Reads the engine's own counters when Prometheus asks."""

    def __init__(self, worker: EngineWorker):
        self.worker = worker

    def collect(self):
        """The metrics of the engine as they stand."""
        engine, stats = self.worker.engine, self.worker.engine.stats
        running = len(engine.running)
        gauges = {
            "rodimus_slots": ("Sequences that can run at once", engine.slots),
            "rodimus_running_sequences": ("Sequences in slots", running),
            "rodimus_unfinished_requests": ("Running or waiting", self.worker.unfinished),
            "rodimus_state_bytes": ("Memory of all slots' states", engine.states.nbytes),
            "rodimus_recent_state_bytes": (
                "Memory of the states that sequences left behind",
                engine.prefixes.recent_bytes,
            ),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(name, what, value=value)
        counters = {
            "rodimus_engine_steps": ("Steps of the engine", stats.steps),
            "rodimus_prompt_tokens": ("Prompt tokens read", stats.prompt_tokens),
            "rodimus_prefix_tokens": ("Prompt tokens that a state stood for", stats.prefix_tokens),
            "rodimus_generated_tokens": ("Tokens generated", stats.generated_tokens),
        }
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(name, what, value=value)
        finished = CounterMetricFamily(
            "rodimus_finished_sequences", "Sequences ended, by reason", labels=["reason"]
        )
        for reason, count in list(stats.finished.items()):
            finished.add_metric([reason], count)
        yield finished
