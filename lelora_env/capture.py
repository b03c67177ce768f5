"""A function of static tensors, run as one CUDA graph where that is possible and plainly elsewhere."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP_CALLS = 2


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector: what it frees on the device would end up in the recording."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class SharedPool:
    """Memory for the intermediate tensors of graphs that never run at the same time: one lot for all of them.

    Attributes:
        handle: Torch's name for it.
        warned: Whether a warning has said that something cannot be recorded.
    """

    def __init__(self) -> None:
        """Open a pool on the current device."""
        self.warned = False
        self.renew()

    def renew(self) -> None:
        """Take new memory for graphs to come; a recording that broke off leaves the old one in an unusable state."""
        self.handle: Any = torch.cuda.graph_pool_handle()


class Captured(Generic[T]):
    """Calls a function; on CUDA its kernels are recorded once and replayed as a graph from then on.

    The function must read and write tensors that stay where they are, take no arguments, and return
    tensors (in whatever structure) that the caller copies before the next call. Where capture fails
    (an operation that synchronises or draws from a generator), the function is called plainly and one
    warning says why; the numbers are the same.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[], T],
        enabled: bool,
        rehearsal: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        pool: SharedPool | None = None,
    ) -> None:
        """Wrap `function`.

        Args:
            name: For the log.
            function: What to run.
            enabled: Whether to capture at all.
            rehearsal: Gives a context in which calling the function leaves no trace; it is needed
                because a function has to run a few times before it can be captured. Default: the
                function leaves none.
            pool: Memory to share with other captured functions; they also share the one warning.
        """
        self.name = name
        self.function = function
        self.rehearsal = rehearsal
        self.pool = pool
        self.enabled = enabled
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: T | None = None

    def __call__(self) -> T:
        """Run the function once."""
        if self.enabled and self.graph is None:
            self._capture()
        if self.graph is None:
            return self.function()
        self.graph.replay()
        return self.result  # type: ignore[return-value]

    def _recording(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        handle = None if self.pool is None else self.pool.handle
        return torch.cuda.graph(graph, pool=handle, capture_error_mode="thread_local")

    def _capture(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with self.rehearsal():
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP_CALLS):
                        self.function()
                torch.cuda.current_stream().wait_stream(stream)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # what the warm-up needed, the graph needs again
                with _no_collection(), self._recording(graph):
                    self.result = self.function()
        except torch.cuda.OutOfMemoryError:
            if self.pool is not None:
                self.pool.renew()
            raise
        except RuntimeError as error:
            self.enabled = False
            self.result = None
            torch.cuda.synchronize()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            level = logging.DEBUG if self.pool is not None and self.pool.warned else logging.WARNING
            logger.log(level, "the %s runs without a CUDA graph (slower, same numbers): %s", self.name, reason)
            if self.pool is not None:
                self.pool.warned = True
                self.pool.renew()
        else:
            self.graph = graph
