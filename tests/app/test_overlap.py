"""`blocks_shared` against the stored selections, and what run.overlap makes of it."""

import os
import unittest

import h5py
import numpy as np

from harness import SMALL, AppTest
from test_gate import KERNELS


class Overlap(AppTest):
    INPUT = SMALL.replace("context = 64", 'context = 500\nscope = "attention"\nmodes = ["total"]').replace(
        "[run]", "[nsa]\nl = 8\nd = 4\nl_sel = 8\nn_sel = 8\nw = 32\n[run]")

    def blocks_shared(self, kind, overlap, *settings, ranks=0):
        """Of the file, and recomputed from `selected`."""
        self.write("in.toml", self.INPUT)
        name = f"{kind}{overlap}{len(os.listdir(self.folder))}.h5"
        done = self.assert_ok(self.nsa("run", "in.toml", "--output", name, "--set", f"task.kind={kind}", "--set",
                                       f"run.overlap={overlap}", "--set", "output.tensors=true",
                                       *(word for setting in settings for word in ("--set", setting)), ranks=ranks))
        self.assertIn(f"FOM {kind}_blocks_shared_context_500 = ", done.out)
        with h5py.File(os.path.join(self.folder, name)) as file:
            point = file["points/0000"]
            selected = point["tensors/selected"][()]
            lists = [[set(blocks) - {-1} for blocks in row] for row in selected.swapaxes(1, 2).reshape(
                -1, selected.shape[1], selected.shape[3])]
            shares = [len(a & b) / len(b) for row in lists for a, b in zip(row, row[1:])]
            self.assertEqual(point.attrs["run.overlap"], overlap)
            return point.attrs["blocks_shared"], np.mean(shares)

    def test_prefill(self):
        found = {}
        for overlap in 0, 0.5, 1:
            stored, recomputed = self.blocks_shared("prefill", overlap)
            self.assertAlmostEqual(stored, recomputed, delta=0.005)  # pairs across the edges of tiles are not compared
            found[overlap] = stored
        self.assertLess(found[0], 0.6)
        # A query that repeats the one before shares all but a forced block, every l' positions.
        self.assertGreater(found[1], 0.97)
        self.assertAlmostEqual(found[0.5], (found[0] + found[1]) / 2, delta=0.06)
        stored, recomputed = self.blocks_shared("prefill", 0.5, "parallel.kv=2", ranks=2)
        self.assertAlmostEqual(stored, recomputed, delta=0.02)

    def test_decode(self):
        for overlap in 0, 1:
            stored, recomputed = self.blocks_shared("decode", overlap, "run.steps=20")
            self.assertAlmostEqual(stored, recomputed, places=9)

    def test_kernels(self):
        self.write("k.toml", KERNELS)
        for overlap, least, most in (0, 0.4, 0.7), (0.5, 0.6, 0.95), (1, 1, 1):
            done = self.assert_ok(self.nsa("run", "k.toml", "--output", f"{overlap}.h5", "--set",
                                           f"run.overlap={overlap}"))
            self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")
            with h5py.File(os.path.join(self.folder, f"{overlap}.h5")) as file:  # 4 of 7 blocks
                self.assertGreaterEqual(file["points/0000"].attrs["blocks_shared"], least)
                self.assertLessEqual(file["points/0000"].attrs["blocks_shared"], most)

    def test_where_it_means_nothing(self):
        self.write("in.toml", SMALL)
        for settings in [], ["task.kind=needle"], ["run.scope=attention", "input.file=x.h5"]:
            done = self.nsa("run", "in.toml", "--set", "run.overlap=0.5",
                            *(word for setting in settings for word in ("--set", setting)))
            self.assertEqual(done.code, 2, done.out + done.err)
            self.assertIn("run.overlap needs synthetic q", done.err)


if __name__ == "__main__":
    unittest.main(verbosity=2)
