"""Record training steps as CUDA graphs, so that each step is one launch.

A step of this network consists of thousands of kernels of a few microseconds each. Launched one by one, they keep the
GPU waiting for the CPU most of the time. A CUDA graph records the launches once and replays them as one.
"""
import contextlib
import gc

import torch

from compressed.errors import BadInput, one_line


class Graphs:
    """Record and replay one CUDA graph for each kind of step.

    learn(inputs, kind): function that makes a step. It runs on the device only, never waits for it, and changes tensors
    in place that exist as long as the graphs. inputs: tuple of tensors, of the same shapes at every step.
    """

    def __init__(self, learn, device: torch.device, stream: torch.cuda.Stream | None = None):
        # of high priority: the work on other streams fills the gaps
        self.stream = stream or torch.cuda.Stream(device, priority=-1)
        self.learn, self.graphs, self.inputs = learn, {}, None

    def step(self, kind, inputs: tuple) -> None:
        """Make the step learn(inputs, kind). The first of a kind runs without a graph, as it compiles and allocates."""
        if self.inputs is None:
            self.inputs = tuple(torch.empty_like(each) for each in inputs)
        for mine, theirs in zip(self.inputs, inputs):
            mine.copy_(theirs)
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):  # autograd remembers streams, so all steps have to run on the recording's
            if kind not in self.graphs:
                self.graphs[kind] = None
                self.learn(self.inputs, kind)
            else:
                if self.graphs[kind] is None:
                    self.graphs[kind] = self.record(kind)
                self.graphs[kind].replay()
        before.wait_stream(self.stream)

    def forget(self) -> None:
        """Delete all graphs, so that `step` records new ones: a graph repeats what was done when it was recorded."""
        self.graphs.clear()

    def record(self, kind) -> torch.cuda.CUDAGraph:
        """Return the graph of a step of this kind; recording does not execute it. Raises BadInput if it fails."""
        graph = torch.cuda.CUDAGraph()
        # graphs are replayed one at a time, and their temporary tensors are not read afterwards: they share memory
        pool = next((each.pool() for each in self.graphs.values() if each is not None), None)
        collected = gc.isenabled()
        gc.collect()  # autograd nodes that are left in cycles remember the stream on which they were made
        gc.disable()  # it could find an older graph, and destroying one breaks a recording
        failed = None
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                try:
                    self.learn(self.inputs, kind)
                except Exception as error:
                    failed = error
                    raise
        except Exception as error:  # the end of a recording that failed raises an error of its own
            raise BadInput(f"a training step cannot be recorded as a CUDA graph ({one_line(failed or error)}); "
                           "--no-graphs trains without") from (failed or error)
        finally:
            if collected:
                gc.enable()
        return graph


class Streams:
    """Run work on several CUDA streams, so that kernels too small to fill the device overlap, at least in a graph."""

    def __init__(self):
        self.streams = [torch.cuda.Stream() for _ in range(16)]
        self.busy = []  # those that later work has to wait for

    @contextlib.contextmanager
    def forked(self, k: int):
        """Run the block on stream k (modulo their number), after all work already queued on the current stream."""
        stream = self.streams[k % len(self.streams)]
        stream.wait_stream(torch.cuda.current_stream())
        self.busy.append(stream)
        with torch.cuda.stream(stream):
            yield

    def for_each(self, function, items: list) -> None:
        """Call function(item) for every item, distributed over the streams; later work waits for all streams in use."""
        for k, item in enumerate(items):
            with self.forked(k):
                function(item)
        for stream in dict.fromkeys(self.busy):
            torch.cuda.current_stream().wait_stream(stream)
        self.busy.clear()
