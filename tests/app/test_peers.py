"""Files of peers (scripts/bench/peers): what is written, and that `nsa` reads, reports and judges them."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
import unittest
import unittest.mock

import h5py
import numpy as np

from harness import SMALL, AppTest
from test_gate import INCONCLUSIVE, KERNELS

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "bench"
sys.path.insert(0, str(SCRIPTS))
from peers import isolation, kernels, measure, report, result_file, shapes, timing  # noqa: E402

INPUT = KERNELS.replace('blocks = 4', 'blocks = [2, 4]\nspans = ["mixed", "scattered"]')


def measured(point, gather=40e-6, packed=30e-6):
    """A point as scripts/bench/bench_gpu.py makes it, with times of its own."""
    reps = point["run.steps"]
    error = {"mean": 1e-8, "standard_error": 1e-10, "max": 1e-7}
    return {"parameters": point, "implementations": ["torch_cudnn_sdpa", "torch_cudnn_sdpa_packed"],
            "variants": ["index_select, CUDNN_ATTENTION", "CUDNN_ATTENTION"], "errors": [error, error],
            "warmup": point["run.warmup"], "seconds": [[gather] * reps, [packed] * reps]}


class Shapes(unittest.TestCase):
    def test_the_points_of_an_input(self):
        points = shapes.points_of(INPUT)
        self.assertEqual(len(points), 4)
        self.assertEqual(points[0]["kernels.cold"], True)
        self.assertEqual({p["kernels.blocks"] for p in points}, {2, 4})
        self.assertEqual({p["kernels.spans"] for p in points}, {"mixed", "scattered"})
        self.assertEqual({p["model.precision"] for p in points}, {"fp32"})
        inputs = pathlib.Path(os.environ["NSA_INPUTS"], "gate")
        self.assertEqual(len(shapes.points_of((inputs / "m4_kernels.toml").read_text())), 48)
        self.assertEqual(shapes.points_of((inputs / "flash_guard.toml").read_text()), [])
        with self.assertRaisesRegex(ValueError, 'not of kind = "kernels"'):
            shapes.points_of(SMALL)

    def test_chosen_blocks(self):
        point = {**shapes.points_of(INPUT)[0], "run.context": 8192, "kernels.rows": 512, "kernels.blocks": 16}
        for spans, neighbours in ("contiguous", 15), ("mixed", 7), ("scattered", 0):
            chosen = shapes.choose_blocks({**point, "kernels.spans": spans})
            self.assertEqual(chosen.shape, (512, 16))
            self.assertTrue((np.diff(chosen, axis=1) > 0).all())
            self.assertGreaterEqual(chosen.min(), 0)
            self.assertLess(chosen.max(), (8192 - 512) // 64)
            together = (np.diff(chosen, axis=1) == 1).sum(axis=1)
            self.assertGreaterEqual(together.min(), neighbours)
            if spans == "scattered":  # 15 pairs, each adjacent with probability 16 / 120
                self.assertLess(abs(together.mean() - 2), 0.3)
        point["kernels.spans"] = "scattered"
        for overlap in 0.5, 0.9, 1:
            chosen = shapes.choose_blocks({**point, "run.overlap": overlap})
            repeated = (chosen[1:] == chosen[:-1]).all(axis=1).mean()  # four standard errors of 511 draws
            self.assertLessEqual(abs(repeated - overlap), 4 * (overlap * (1 - overlap) / 511) ** 0.5)
        with self.assertRaisesRegex(ValueError, "200 blocks do not fit"):
            shapes.choose_blocks({**point, "kernels.blocks": 200})

    def test_errors_against_float64(self):
        exact = np.zeros((2, 2))
        error = shapes.error_of(np.array([[1.0, -3.0], [0.0, 8.0]]), exact)
        self.assertEqual((error["mean"], error["max"]), (3.0, 8.0))
        self.assertAlmostEqual(error["standard_error"], 1.0)  # means 2 and 4: sqrt(2) / sqrt(2)
        self.assertEqual(shapes.error_of(np.array([[np.nan, 0.0]]), np.zeros((1, 2)))["max"], np.inf)

    def test_samples_are_taken_in_turns(self):
        order = []

        class Sampler:
            def __init__(self, name):
                self.name = name

            def sample(self):
                order.append(self.name)
                return float(len(order))

        seconds = timing.alternate([Sampler("a"), Sampler("b"), Sampler("c")], 3)
        self.assertEqual("".join(order), "abc" + "bac" + "cab")
        self.assertEqual(seconds, [[1, 5, 8], [2, 4, 9], [3, 6, 7]])
        self.assertEqual([timing.copies_of(2 << 20), timing.copies_of(1), timing.copies_of(1, False)], [64, 64, 1])
        self.assertEqual([timing.copies_of(100 << 20), timing.copies_of(1 << 30)], [2, 1])


class FakeSampler:
    """Replays that write V + `error` into rows [:written], `writes` times; then nothing."""

    def __init__(self, inputs, error=0.0, written=None, writes=10**9, seconds=10e-6):
        self.inputs, self.error, self.written, self.writes = inputs, error, written, writes
        self.output, self.seconds = inputs.exact(), seconds

    def sample(self):
        if self.writes > 0:
            self.output[:self.written] = self.inputs.values + self.error
        self.writes -= 1
        return self.seconds

    def worst_error(self, exact):
        return np.abs(self.output - exact).max()


class FakeInputs:
    """Inputs whose output is V, 1, and whose floor is 5 us. The copies of a candidate are its sampler's arguments."""

    values = 1.0

    def exact(self):
        return np.ones((4, 2, 3))

    def scale_values(self, factor):
        self.values *= factor

    def floor(self):
        return 5e-6

    def on_host(self, output):
        return output

    def sampler(self, call, sampler):
        return FakeSampler(self, **sampler)

    def synchronize(self):
        pass


class Output(np.ndarray):
    """The operations of a tensor on a GPU that timing.CudaGraphs calls."""

    def cuda(self):
        return self

    def double(self):
        return self.astype("f8")

    def fill_(self, value):
        self[...] = value

    def nan_to_num(self, nan, posinf):
        return np.nan_to_num(self, nan=nan, posinf=posinf)

    def abs(self):
        return np.abs(self)


class FakeCuda(types.SimpleNamespace):
    """torch.cuda whose graphs replay the kernels that were launched while they captured."""

    class CUDAGraph:
        def __init__(self):
            self.kernels = []

        def replay(self):
            for kernel in self.kernels:
                kernel()

    class Event(types.SimpleNamespace):
        def record(self):
            pass

        def elapsed_time(self, end):
            return 0.08  # ms, of 8 executions

        synchronize = record

    def __init__(self):
        super().__init__(capturing=None, synchronize=lambda: None, current_stream=lambda: None,
                         stream=lambda stream: contextlib.nullcontext(),
                         Stream=lambda: types.SimpleNamespace(wait_stream=lambda other: None))

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = graph
        yield
        self.capturing = None

    def launch(self, kernel, captured=True):
        if captured and self.capturing:
            self.capturing.kernels.append(kernel)
        else:
            kernel()


class GraphInputs(FakeInputs):
    def sampler(self, call, copies):
        return timing.CudaGraphs(call, copies)


class Measure(unittest.TestCase):
    def measured(self, candidates):
        """(names that have a time, what was said of the others)."""
        point = {"model.precision": "bf16", "run.steps": 8, "run.warmup": 2}
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            found = measure.measure(point, FakeInputs(), [(name, "v", lambda copy, out=out: out, sampler)
                                                          for name, out, sampler in candidates])
        return found, said.getvalue()

    def test_a_time_counts_where_the_timed_replays_did_the_work(self):
        right = np.ones((4, 2, 3))
        found, said = self.measured([
            ("honest", right, {}),
            ("not_captured", right, {"writes": 0, "seconds": 2.8e-6}),  # it ran on another stream than the graph's
            ("half", right, {"written": 2}),
            ("once", right, {"writes": 1}),  # right when it is checked, and idle when it is timed
            ("other", right, {"error": 0.5}),
            ("too_fast", right, {"seconds": 2.8e-6}),
            ("wrong", right + 1, {}),
        ])  # fmt: skip
        self.assertEqual(found["implementations"], ["honest"])
        self.assertEqual((len(found["seconds"][0]), found["warmup"], found["errors"][0]["max"]), (8, 2, 0))
        for name, error in ("not_captured", 1.0), ("half", 1.0), ("once", 1.0), ("other", 0.5):
            self.assertIn(f"{name} is INVALID: outputs of its replays are off by {error:.1e} after V has changed", said)
        self.assertIn("too_fast is INVALID: 2.80 us are less than the floor of 5.00 us", said)
        self.assertIn("wrong is left out: its error against float64 is 1.0e+00", said)
        self.assertEqual(len(said.splitlines()), 6)
        self.assertIsNone(self.measured([("half", right, {"written": 2})])[0])

    def test_graphs_that_replay_the_work(self):
        """Through CudaGraphs on a fake of torch: 3 graphs of 8 executions over 20 copies."""
        cuda, inputs = FakeCuda(), GraphInputs()
        torch = types.SimpleNamespace(cuda=cuda, from_numpy=lambda values: values.view(Output))

        def adapter(captured=True, bad_copy=None):
            def call(copy):
                output = np.zeros((4, 2, 3)).view(Output)
                cuda.launch(lambda: output.fill_(0.0 if copy == bad_copy else inputs.values), captured)
                return output
            return call

        point = {"model.precision": "bf16", "run.steps": 8, "run.warmup": 2}
        adapters = {"honest": adapter(), "on_another_stream": adapter(captured=False), "bad_copy": adapter(bad_copy=19)}
        said = io.StringIO()
        with unittest.mock.patch.dict(sys.modules, torch=torch), contextlib.redirect_stderr(said):
            found = measure.measure(point, inputs, [(name, "v", call, 20) for name, call in adapters.items()])
        self.assertEqual(found["implementations"], ["honest"])
        self.assertEqual(found["seconds"], [[1e-5] * 8])
        for name in "on_another_stream", "bad_copy":
            self.assertIn(f"{name} is INVALID: outputs of its replays are off by 1.0e+00", said.getvalue())

    def test_least_work(self):
        """By hand: 3 blocks of 64 tokens of K and V, 16 wide, in 2 bytes; q and the output of 32 rows of 2 heads."""
        point = {**shapes.points_of(INPUT)[0], "kernels.rows": 32, "kernels.heads": 2, "kernels.head_size": 16,
                 "nsa.l_sel": 64, "kernels.cold": True}
        blocks = np.array([[0, 1], [1, 2]] * 16)
        kv, q = 3 * 64 * 16 * 2 * 2, 32 * 2 * 16 * 2
        self.assertEqual(shapes.least_work(point, blocks, 2), (kv + 2 * q, 2 * 2 * 32 * 2 * (2 * 64) * 16))
        self.assertEqual(shapes.least_work({**point, "kernels.cold": False}, blocks, 2)[0], 2 * q)


PACKAGE = """
import os, signal, sys, time
sys.path.insert(0, {bench!r})
from peers import isolation

def measure_point(point):
    package, rows = sys.argv[1], point["kernels.rows"]
    if rows == 2 and package == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if rows == 2 and package == "exits":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if rows == 2 and package == "hangs":
        time.sleep(100)
    if package == "refuses":
        return None
    return {{"parameters": point, "implementations": [package], "variants": ["v"], "warmup": 1,
             "errors": [{{"mean": 0, "standard_error": 0, "max": 0}}], "seconds": [[rows, rows]]}}

isolation.serve(sys.argv[2], lambda: {{"program": "fake 1.0", "system": {{}}}}, measure_point)
"""


class Isolation(unittest.TestCase):
    def test_a_crash_costs_one_shape_of_one_package(self):
        points = [{"kernels.rows": rows} for rows in (1, 2, 3)]
        with tempfile.TemporaryDirectory() as folder:
            script = pathlib.Path(folder, "package.py")
            script.write_text(PACKAGE.format(bench=str(SCRIPTS)))
            commands = {name: [sys.executable, str(script), name] for name in
                        ("crashes", "honest", "exits", "hangs", "refuses")}
            found, about, crashes = isolation.measure_apart(commands, points, limit=4)
        names = [point["implementations"] for point in found]
        self.assertEqual(names, [["crashes", "honest", "exits", "hangs"], ["honest"],
                                 ["crashes", "honest", "exits", "hangs"]])
        self.assertEqual([point["seconds"][-1][0] for point in found], [1, 2, 3])
        self.assertEqual(about["program"], "fake 1.0")
        self.assertEqual(crashes, {("crashes", 1): "killed by SIGSEGV", ("exits", 1): "exit code 1",
                                   ("hangs", 1): "no end after 4 s"})


class Kernels(unittest.TestCase):
    """scripts/bench/bench_peers.py where torch is not: what is there, and what each adapter asks of a shape."""

    def listed(self, *paths):
        arguments = [word for path in paths for word in ("--path", path)]
        script = SCRIPTS / "bench_peers.py"
        done = subprocess.run([sys.executable, script, "--list", *arguments], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_what_is_not_there_is_named(self):
        out = self.listed()
        for name in kernels.ADAPTERS:
            self.assertIn(f"{name}: not measured (no Python package {name}: install it", out)
        for name, reason in kernels.OTHER_WORK.items():
            self.assertIn(f"{name}: not measured (other work: {reason})", out)

    def test_a_checkout_is_found(self):
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(os.path.join(folder, "flash_nsa"))
            out = self.listed(folder)
        self.assertIn("flash_nsa: the same work\n", out)
        self.assertIn("fla: not measured (no Python package fla", out)

    def test_an_adapter_that_does_not_take_the_shape_is_left_out(self):
        def refuses(inputs):
            raise ValueError(f"{inputs} is too small\nmore")
            yield

        def takes(inputs):
            yield "name", "variant", None, 1

        with contextlib.redirect_stdout(io.StringIO()) as out:
            found = list(kernels.implementations("shape", {"a": refuses, "b": takes}))
        self.assertEqual(found, [("name", "variant", None, 1)])
        self.assertEqual(out.getvalue(), "  a is left out: shape is too small\n")


class Files(AppTest):
    def test_medians_leave_the_warm_up_out(self):
        point = measured(shapes.points_of(INPUT)[0])
        point["seconds"][0][:2] = [1, 1]  # both of the warm-up
        row = report.medians(point)
        self.assertAlmostEqual(row["us"]["torch_cudnn_sdpa"], 40)
        self.assertEqual((row["rows"], row["heads"], row["spans"]), (32, 2, "mixed"))

    def peers(self, name, points, input_toml=INPUT, **system):
        run = result_file.run_attributes("torch 2.11.0", input_toml, "host", result_file.now())
        path = os.path.join(self.folder, name)
        result_file.write(path, run, result_file.system_columns(**system), points)
        return path

    def test_the_file_is_a_result_file(self):
        path = self.peers("peers.h5", [measured(p) for p in shapes.points_of(INPUT)])
        with h5py.File(path) as file:
            self.assertEqual(file.attrs["program"], "torch 2.11.0")
            time = file["points/0003/kernels/time"]
            self.assertEqual(time.shape, (2, 1, 12))
            self.assertEqual(time.dims[0][0].name, "/points/0003/kernels/implementation")
            self.assertEqual(file["points/0000"].attrs["kernels.blocks"], 2)
            schema = file.attrs["schema_version"]
        self.write("in.toml", SMALL)
        self.assert_ok(self.nsa("run", "in.toml", "--output", "run.h5"))
        with h5py.File(os.path.join(self.folder, "run.h5")) as file:
            self.assertEqual(file.attrs["schema_version"], schema)
        for name in ("in.toml", "run.h5"):
            os.remove(os.path.join(self.folder, name))
        done = self.assert_ok(self.nsa("report", "peers.h5"))
        self.assertIn("torch_cudnn_sdpa 40.0 us, torch_cudnn_sdpa_packed 30.0 us\n", done.out)
        self.assertIn("FOM kernels_torch_cudnn_sdpa_time_sel_N32_H2_D16_n4_mixed_context_512 = 40.000 us\n", done.out)
        self.assertEqual(os.listdir(self.folder), ["peers.h5"])

    def run_quietly(self, name, *arguments):
        """NAME.toml to NAME.h5, without what other work on this machine did: NOISY points decide nothing."""
        self.assert_ok(self.nsa("run", f"{name}.toml", "--output", f"{name}.h5", *arguments))
        with h5py.File(os.path.join(self.folder, f"{name}.h5"), "r+") as file:
            for point in file["points"].values():
                point.attrs["noisy"] = ""

    def test_the_gate_decides_on_the_fastest(self):
        self.write("k.toml", INPUT)
        self.run_quietly("k")
        self.write("d.toml", SMALL)
        self.run_quietly("d", "--set", "run.steps=12", "--set", "route.sel=sdpa", "--set",
                         'run.modes=["branches", "total", "ablation"]')  # fmt: skip
        alone = self.assert_ok(self.nsa("gate", "d.h5", "k.h5"))
        self.assertIn("note: no library's SDPA is among the baselines", alone.out)
        points = shapes.points_of(INPUT)
        self.peers("fast.h5", [measured(p, 1e-9, 1e-9) for p in points])
        done = self.assert_ok(self.nsa("gate", "fast.h5", "d.h5", "k.h5"))
        self.assertRegex(done.out, r"with the gather +0\.00x .* not met +worst: N=32 .* against torch_cudnn_sdpa\n")
        self.assertIn("the fastest packed SDPA of this program, torch 2.11.0 (fast.h5)", done.out)
        self.assertIn("VERDICT: STAY", done.out)
        self.assertEqual(json.loads(self.nsa("gate", "fast.h5", "d.h5", "k.h5", "--json").out)["devices"][0]["peers"],
                         ["torch 2.11.0 (fast.h5)"])
        self.peers("part.h5", [measured(p, 1, 1) for p in points[:-1]])
        done = self.nsa("gate", "d.h5", "k.h5", "part.h5", "--exit-verdict")
        self.assertIn("no time of it in part.h5", done.out)
        self.assertEqual(done.code, INCONCLUSIVE)
        self.peers("card.h5", [measured(p) for p in points], uuid="GPU-2")
        refused = self.nsa("gate", "d.h5", "k.h5", "card.h5")
        self.assertIn("k.h5 was measured on a device without UUID, card.h5 on GPU-2", refused.err)

    def test_recorded_blocks(self):
        """A peer is paired where it had the same blocks: by the content of the file that holds them."""
        lists = np.sort(np.random.default_rng(1).permuted(np.tile(np.arange(7), (40, 1)), axis=1)[:, :4])
        path = os.path.join(self.folder, "lists.h5")
        with h5py.File(path, "w") as file:
            file["selected"] = lists[None, :, None, :]
        recorded = KERNELS + f'spans = "recorded"\n[input]\nselection = "{path}"\n'
        (point,) = shapes.points_of(recorded)
        np.testing.assert_array_equal(shapes.choose_blocks(point), lists[-32:])
        self.write("k.toml", recorded)
        self.run_quietly("k", "--set", "output.selection=true")
        with h5py.File(os.path.join(self.folder, "k.h5")) as file:
            np.testing.assert_array_equal(file["points/0000/tensors/selected"][0, :, 0], lists[-32:])
        self.peers("peers.h5", [measured(point)], recorded)
        self.assertNotIn("no time of it", self.assert_ok(self.nsa("gate", "k.h5", "peers.h5")).out)
        with h5py.File(path, "r+") as file:
            file["selected"][0, 0] = 0
        self.peers("others.h5", [measured(point)], recorded)
        self.assertIn("no time of it in others.h5", self.assert_ok(self.nsa("gate", "k.h5", "others.h5")).out)
        with self.assertRaisesRegex(ValueError, "holds no 33 rows of 5 blocks"):
            shapes.choose_blocks({**point, "kernels.rows": 33, "kernels.blocks": 5})


if __name__ == "__main__":
    unittest.main(verbosity=2)
