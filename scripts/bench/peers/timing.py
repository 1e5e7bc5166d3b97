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

        self.graphs, self.outputs, self.next, self.replayed = [], [], 0, set()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries select and load their kernels outside of a graph
            for copy in range(min(2, copies)):
                call(copy)
        torch.cuda.synchronize()
        count = -(-copies // EXECUTIONS_A_GRAPH)
        for first in range(0, count * EXECUTIONS_A_GRAPH, EXECUTIONS_A_GRAPH):
            graph = torch.cuda.CUDAGraph()  # with memory of its own: no other graph writes over its outputs
            with torch.cuda.graph(graph, stream=stream):
                outputs = [call((first + i) % copies) for i in range(EXECUTIONS_A_GRAPH)]
            self.graphs.append(graph)
            self.outputs.append(outputs)

    def sample(self):
        """Seconds of one execution."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        which = self.next % len(self.graphs)
        begin.record()
        self.graphs[which].replay()
        end.record()
        end.synchronize()
        self.next += 1
        self.replayed.add(which)
        return begin.elapsed_time(end) * 1e-3 / EXECUTIONS_A_GRAPH


    def worst_error(self, exact):
        """Largest error of the outputs of all replays since the last call; infinite where a value is NaN."""
        import torch

        truth, infinite = torch.from_numpy(exact).cuda(), float("inf")
        errors = [(output.double() - truth).abs().nan_to_num(infinite, infinite).max().item()
                  for which in self.replayed for output in self.outputs[which]]
        self.replayed.clear()
        return max(errors, default=infinite)


def alternate(samplers, steps):
    """[sampler][rep]: repetition i of all samplers is taken in succession; the order rotates and is reversed."""
    seconds = [[0.0] * steps for _ in samplers]
    for rep in range(steps):
        for i in range(len(samplers)):
            turn = (i + rep) % len(samplers)
            which = turn if rep % 2 == 0 else len(samplers) - 1 - turn
            seconds[which][rep] = samplers[which].sample()
    return seconds
