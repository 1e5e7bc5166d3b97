"""Times implementations of one shape in alternation, as `nsa run` does for `kind = "kernels"` (docs/METRICS.md)."""

EXECUTIONS_A_GRAPH = 8  # as lib/nsa/tasks/kernels_task.cpp
COLD_BYTES, MAX_COPIES = 128 << 20, 64  # as lib/nsa/tasks/kernel_bench.cpp


def copies_of(bytes_of_copy, cold=True):
    """How many copies of the inputs keep every execution from finding its own in a cache."""
    return max(1, min(MAX_COPIES, -(-COLD_BYTES // max(1, bytes_of_copy)))) if cold else 1


class CudaGraphs:
    """`call(copy)` in graphs of 8 executions, over `copies` copies of the inputs in turn; needs torch with CUDA."""

    def __init__(self, call, copies):
        import torch

        self.graphs, self.next = [], 0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries select and load their kernels outside of a graph
            for copy in range(min(2, copies)):
                call(copy)
        torch.cuda.synchronize()
        count = -(-copies // EXECUTIONS_A_GRAPH)
        for first in range(0, count * EXECUTIONS_A_GRAPH, EXECUTIONS_A_GRAPH):
            graph = torch.cuda.CUDAGraph()
            pool = self.graphs[0].pool() if self.graphs else None
            with torch.cuda.graph(graph, stream=stream, pool=pool):
                for i in range(EXECUTIONS_A_GRAPH):
                    call((first + i) % copies)
            self.graphs.append(graph)

    def sample(self):
        """Seconds of one execution."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graphs[self.next % len(self.graphs)].replay()
        end.record()
        end.synchronize()
        self.next += 1
        return begin.elapsed_time(end) * 1e-3 / EXECUTIONS_A_GRAPH


def alternate(samplers, steps):
    """[sampler][rep]: repetition i of all samplers is taken in succession; the order rotates and is reversed."""
    seconds = [[0.0] * steps for _ in samplers]
    for rep in range(steps):
        for i in range(len(samplers)):
            turn = (i + rep) % len(samplers)
            which = turn if rep % 2 == 0 else len(samplers) - 1 - turn
            seconds[which][rep] = samplers[which].sample()
    return seconds
