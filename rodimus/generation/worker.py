"""The engine in a thread of its own: requests from any thread, news by callback, bounded queue."""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial

from .engine import STEP_FAILED, Delta, Engine, Generation, Request

logger = logging.getLogger(__name__)

# the engine counts as broken when this many steps in a row have failed
MOST_FAILURES = 3

Listener = Callable[[Generation, Delta], None]


class QueueFullError(Exception):
    """The queue has no room for the requests; try again later."""


class WorkerStoppedError(Exception):
    """The worker takes no requests: it is shutting down, or its engine has failed."""


class EngineWorker:
    """Runs an engine's steps as long as there is work.

    A step that fails ends what was under way, and the rest goes on; after ``MOST_FAILURES`` in a
    row everything is given up.

    Args:
        engine: The engine, which only this worker's thread calls once it is started.
        max_waiting: Requests that may wait besides those that the slots hold.

    Attributes:
        after_news: Called in the worker's thread when listeners have received all news: once per
            step, however many listeners there are.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 64):
        if max_waiting < 0:
            raise ValueError(f"max_waiting must be at least 0, got {max_waiting}")
        self.engine, self.max_waiting = engine, max_waiting
        self.failure: BaseException | None = None
        self.after_news: Callable[[], None] = lambda: None
        self._listeners: dict[Generation, Listener] = {}
        self._arrived: list[Generation] = []
        self._cancelled: list[Generation] = []
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rodimus-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel what is not finished, tell its listeners, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def accepts(self) -> bool:
        """Whether requests are taken: the thread runs and its engine has not failed."""
        return self._thread.is_alive() and not self._stopping and self.failure is None

    @property
    def unfinished(self) -> int:
        """Requests taken and not finished: waiting, being read, running."""
        return len(self._listeners)

    def submit(self, requests: Sequence[Request], listener: Listener) -> list[Generation]:
        """Check and queue requests, all or none.

        Args:
            requests, listener: As for ``prepare`` and ``enqueue``.

        Raises:
            ValueError, QueueFullError, WorkerStoppedError: as they do.
        """
        generations = self.prepare(requests)
        self.enqueue(generations, listener)
        return generations

    def prepare(self, requests: Sequence[Request]) -> list[Generation]:
        """Check requests without queueing them; those with the same prompt object share its tensor.

        Raises:
            ValueError: one of them cannot be served.
        """
        generations, of_prompt = [], {}
        for request in requests:
            like = of_prompt.get(id(request.prompt))
            generations.append(self.engine.prepare(request, like))
            of_prompt[id(request.prompt)] = generations[-1]
        return generations

    def check_room(self, count: int) -> None:
        """Raise unless ``enqueue`` would take ``count`` generations now.

        Raises:
            ValueError, QueueFullError, WorkerStoppedError: as ``enqueue`` does.
        """
        if not self.accepts:
            raise WorkerStoppedError("the engine is not running")
        most = self.engine.slots + self.max_waiting
        if count > most:
            raise ValueError(f"at most {most} texts can run or wait at once, got {count}")
        if count > most - self.unfinished:
            raise QueueFullError(f"{self.unfinished} requests are running or waiting")

    def enqueue(self, generations: Sequence[Generation], listener: Listener) -> None:
        """Queue generations that ``prepare`` made, all or none.

        Args:
            listener: Called with every generation's news, in the worker's thread: it must be quick.
                The last news of a generation has a ``finish_reason``. If the listener raises, the
                generation is cancelled.

        Raises:
            ValueError: they are more than there is ever room for.
            QueueFullError: there is no room for them now.
            WorkerStoppedError: the worker takes no requests any more.
        """
        with self._changed:
            self.check_room(len(generations))
            self._listeners.update(dict.fromkeys(generations, listener))
            self._arrived += generations
            self._changed.notify()

    def cancel(self, generations: Sequence[Generation]) -> None:
        """End requests soon, wherever they are; those that have ended are left as they are."""
        with self._changed:
            self._cancelled += generations
            self._changed.notify()

    def _run(self):
        failures, news = 0, []
        try:
            while True:
                self._wait_for_work()
                try:
                    if not self._pass_on():
                        return
                    news = self.engine.step(partial(self._report, news))
                    failures = 0
                # a panic of a tokenizer in Rust is not an `Exception`
                except BaseException:
                    failures += 1
                    if failures == MOST_FAILURES:
                        raise
                    logger.exception("a step of the engine failed; what was under way has ended")
                    self._give_up(but=self.engine.waiting)
                    news = []
                    continue
                if not self.engine.has_work:
                    self._report(news)
                    news = []
        except BaseException as error:
            logger.exception("the engine failed; all its requests are given up")
            self.failure = error
            self._give_up()

    def _wait_for_work(self):
        with self._changed:
            while not (self._arrived or self._cancelled or self._stopping or self.engine.has_work):
                self._changed.wait()

    def _pass_on(self):
        """Pass arrivals and cancellations on to the engine; False when it is time to end."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
            stopping = self._stopping
        for generation in arrived:
            self.engine.enqueue(generation)
        ended = list(self._listeners) if stopping else cancelled
        try:
            for generation in ended:
                self.engine.cancel(generation)
        except BaseException:
            # try again later; those that have ended are left as they are
            self.cancel(ended)
            raise
        self._report(ended)
        return not stopping

    def _give_up(self, but=None):
        """End everything with an error; given ``but``, spare these and new arrivals."""
        with self._changed:
            spared = set() if but is None else {*but, *self._arrived}
            lost = [x for x in self._listeners if x not in spared]
        for generation in lost:
            if generation.finish_reason is None:
                generation.finish_reason, generation.error = "error", STEP_FAILED
        self._report(lost)

    def _report(self, generations):
        for generation in generations:
            self._tell(generation)
        if generations:
            self.after_news()

    def _tell(self, generation):
        listener = self._listeners.get(generation)
        if listener is None:
            return
        delta = generation.drain()
        if delta.finish_reason is not None:
            with self._changed:
                del self._listeners[generation]
        try:
            listener(generation, delta)
        except Exception:
            logger.exception("a listener failed; its request is cancelled")
            self.cancel([generation])
