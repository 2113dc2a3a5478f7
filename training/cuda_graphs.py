"""Steps on a CUDA device as one launch each.

A step of this network is thousands of kernels of a few microseconds each: launched one by one, the GPU waits for the
CPU most of the time. A CUDA graph records the launches once and repeats them in one.
"""
import torch


class Graphs:
    """Steps recorded as CUDA graphs, one for each kind of step.

    learn(inputs, kind): a step, all of it on the device and without a wait for it; what it changes lives on. inputs: a
    tuple of tensors, always of the same shapes.
    """

    def __init__(self, learn, device: torch.device):
        self.learn, self.stream, self.graphs, self.inputs = learn, torch.cuda.Stream(device), {}, None

    def step(self, kind, inputs: tuple) -> None:
        """learn(inputs, kind). The first step of a kind is run as it is (it compiles and allocates), then recorded."""
        if self.inputs is None:
            self.inputs = tuple(torch.empty_like(each) for each in inputs)
        for mine, theirs in zip(self.inputs, inputs):
            mine.copy_(theirs)
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):  # autograd remembers streams: what is recorded has to begin on one
            if kind not in self.graphs:
                self.graphs[kind] = None
                self.learn(self.inputs, kind)
            else:
                if self.graphs[kind] is None:
                    self.graphs[kind] = self.record(kind)
                self.graphs[kind].replay()
        before.wait_stream(self.stream)

    def record(self, kind) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # one at a time is replayed, and nothing of it is read afterwards: all may use the same memory
        pool = next((each.pool() for each in self.graphs.values() if each is not None), None)
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            self.learn(self.inputs, kind)
        return graph


class Streams:
    """Work on streams of its own: kernels too small to fill the device run at the same time, in a graph at least."""

    def __init__(self, count: int = 8):
        self.streams = [torch.cuda.Stream() for _ in range(count)]

    def for_each(self, function, items: list) -> None:
        """function(item) for each, dealt to the streams; what comes next waits for all."""
        now = torch.cuda.current_stream()
        for k, stream in enumerate(self.streams):
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                for item in items[k::len(self.streams)]:
                    function(item)
        for stream in self.streams:
            now.wait_stream(stream)
