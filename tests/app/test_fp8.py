"""What FP8 caches change, as the file says it and as two files show it; needles in FP8 caches; bad input."""

import os
import unittest

import h5py
import numpy as np

from harness import SMALL, AppTest

FP8 = "model.kv_precision=fp8_e4m3", "model.cmp_precision=fp8_e4m3"
NSA = {"l": 8, "d": 4, "l_sel": 8, "n_sel": 8, "w": 32}


def forced(block, position):
    last = position // NSA["l_sel"]
    return block < 1 or last - 2 < block <= last


class Fp8(AppTest):
    INPUT = SMALL.replace("steps = 3", "steps = 32").replace(
        "context = 64", 'context = 500\nscope = "attention"\nmodes = ["total"]').replace(
            "[run]", "[nsa]\n" + "".join(f"{key} = {value}\n" for key, value in NSA.items()) + "[run]")

    def run_decode(self, name, *settings, ranks=0):
        self.write("in.toml", self.INPUT)
        done = self.assert_ok(self.nsa("run", "in.toml", "--output", name, "--set", "output.tensors=true",
                                       *(word for setting in settings for word in ("--set", setting)), ranks=ranks))
        self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")
        return done.out

    def changes(self, name):
        with h5py.File(os.path.join(self.folder, name)) as file:
            attrs = file["points/0000"].attrs
            return [attrs[key] for key in ("selection_agreement", "importance_lost", "o_change", "y_change")]

    def tensors(self, name):
        with h5py.File(os.path.join(self.folder, name)) as file:
            return {
key: file[f"points/0000/tensors/{key}"][()] for key in ("selected", "p_slc", "o")
}

    def test_changes(self):
        """Against a run on unquantised caches."""
        self.run_decode("same.h5")
        same = self.tensors("same.h5")
        for index, settings in enumerate((FP8, FP8[:1], FP8[1:])):
            name = f"fp8_{index}.h5"
            out = self.run_decode(name, *settings)
            fp8 = self.tensors(name)
            agreed, lost = [], []
            batch, steps, groups = same["selected"].shape[:3]
            for at in np.ndindex(batch, steps, groups):
                own, other = (set(x["selected"][at]) - {
  -1} for x in (same, fp8))
                free = {block for block in own if not forced(block, 500 + at[1])}
                agreed.append((len(free & other), len(free)))
                mass = [same["p_slc"][at][list(blocks)].sum(dtype=np.float64) for blocks in (own, other)]
                lost.append(1 - mass[1] / mass[0])
            error = np.linalg.norm(fp8["o"] - same["o"]) / np.linalg.norm(same["o"])
            expected = [np.sum(agreed, axis=0)[0] / np.sum(agreed, axis=0)[1], np.mean(lost), error]
            found = self.changes(name)
            np.testing.assert_allclose(found[:3], expected, rtol=1e-5, atol=1e-7)
            self.assertEqual(found[3], -1)  # scope = "attention" has no y
            self.assertIn("FOM decode_selection_agreement_context_500 = ", out)
            self.assertGreater(found[2], 0.003)
            self.assertLess(found[2], 0.2)
            if "model.cmp_precision=fp8_e4m3" in settings:
                self.assertLess(found[0], 1)
                self.assertGreater(found[0], 0.8)
            else:  # unquantised compressed tokens choose the same blocks
                self.assertEqual(found[:2], [1, 0])
        with h5py.File(os.path.join(self.folder, "same.h5")) as file:
            self.assertNotIn("selection_agreement", file["points/0000"].attrs)

    def test_layouts(self):
        """The same blocks, and so the same changes, on two ranks; y of whole layers."""
        self.run_decode("one.h5", *FP8)
        self.run_decode("two.h5", *FP8, "parallel.kv=2", "parallel.heads=1", ranks=2)
        self.assertTrue((self.tensors("one.h5")["selected"] == self.tensors("two.h5")["selected"]).all())
        np.testing.assert_allclose(self.changes("two.h5"), self.changes("one.h5"), rtol=1e-4, atol=1e-6)
        self.run_decode("layers.h5", *FP8, "run.scope=layer", "model.layers=2")
        self.assertGreater(self.changes("layers.h5")[3], 0.001)

    def test_report(self):
        """Bytes, time and agreement side by side."""
        self.run_decode("same.h5")
        self.run_decode("fp8.h5", *FP8)
        done = self.assert_ok(self.nsa("report", "same.h5", "fp8.h5"))
        self.assertIn("agree", done.out)
        with h5py.File(os.path.join(self.folder, "same.h5")) as same, h5py.File(
                os.path.join(self.folder, "fp8.h5")) as fp8:
            stages = [name.decode() for name in same["points/0000/stage"][()]]
            self.assertEqual(fp8.attrs["schema_version"], "1.9")
            for stage in "attend_cmp", "attend_sel", "attend_win":  # fp32: 64 bytes a row, FP8: 17
                before, after = (f["points/0000/bytes"][stages.index(stage), 0] for f in (same, fp8))
                self.assertLess(after, before)

    def test_gate(self):
        self.run_decode("same.h5")
        self.run_decode("fp8.h5", *FP8)
        done = self.assert_ok(self.nsa("gate", "fp8.h5", "same.h5"))
        self.assertIn("FP8 caches on ", done.out)
        self.assertIn("context 500, batch 1, fp8: ", done.out)
        self.assertIn("blocks as chosen ", done.out)
        self.run_decode("kv.h5", *FP8[:1])
        done = self.assert_ok(self.nsa("gate", "kv.h5", "--adr", "record.md"))
        self.assertIn("no file has this point with unquantised caches", done.out)
        with open(os.path.join(self.folder, "record.md"), encoding="utf-8") as record:
            self.assertIn("INCONCLUSIVE", record.read())

    def test_needles(self):
        self.write("in.toml", self.INPUT.replace('kind = "decode"', 'kind = "needle"').replace(
            'scope = "attention"\n', ""))
        for index, settings in enumerate((FP8, FP8[:1], FP8[1:])):
            done = self.assert_ok(self.nsa("run", "in.toml", "--output", f"{index}.h5",
                                           *(word for setting in settings for word in ("--set", setting))))
            self.assertIn("FOM needle_found_context_500 = 100.00 %", done.out)

    def test_bad_input(self):
        self.write("in.toml", self.INPUT)
        done = self.nsa("run", "in.toml", "--set", FP8[0], "--set", "model.precision=fp16")
        self.assertEqual(done.code, 2)
        self.assertIn("model.kv_precision = \"fp8_e4m3\" needs model.precision", done.err)
        done = self.nsa("run", "in.toml", "--set", "model.cmp_precision=fp8")
        self.assertEqual(done.code, 2)
        self.assertIn("fp8_e4m3", done.err)


if __name__ == "__main__":
    unittest.main(verbosity=2)
