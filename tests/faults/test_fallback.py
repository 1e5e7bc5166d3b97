"""An implementation that refuses the shape or cannot be launched: sdpa's answer, counted and visible everywhere.

With NSA_TEST_BACKEND=cuda on GPUs, where the launch that fails is one that the device refuses, in a capture too."""

import os
import re
import shutil
import subprocess
import sys
import unittest

from harness import SMALL, AppTest


def gpus():
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


CUDA = os.environ.get("NSA_TEST_BACKEND") == "cuda"
RANKS = min(2, gpus()) if CUDA else 2
LAST = RANKS - 1
INPUT = SMALL
REFUSED = r"launch refused \(by NSA_FAULT\)"
if CUDA:  # a shape of the tensor cores' kernels
    INPUT = SMALL.replace('"host"', '"cuda"').replace('"fp32"', '"bf16"').replace("d_k = 16", "d_k = 64").replace(
        "d_v = 16", "d_v = 64")
    REFUSED = r"a kernel with too much shared memory \(by NSA_FAULT\) refused \(invalid argument\)"
PLACE = REFUSED + (f" on rank {LAST}" if LAST else "") + r" \(\d+ calls?\)"


class Fallback(AppTest):
    def run_with(self, fault, *arguments):
        self.write("in.toml", INPUT)
        os.environ["NSA_FAULT"] = fault
        self.addCleanup(os.environ.pop, "NSA_FAULT", None)
        self.file = f"{len(os.listdir(self.folder))}.h5"
        return self.nsa("run", "in.toml", "--output", self.file, *arguments, ranks=RANKS)

    def assert_fell_back(self, done, line):
        """In the table, in the lines behind it, and in the file, whose text lies there as it is."""
        self.assert_ok(done)
        self.assertIn("RESULT: VALID", done.out)
        self.assertRegex(done.out, r"fallback at context_\d+: " + line)
        self.assertRegex(done.out, r"\n +64 .*  FALLBACK\n")
        with open(os.path.join(self.folder, self.file), "rb") as file:
            self.assertRegex(file.read(), line.encode())

    def test_a_refused_shape(self):
        done = self.run_with("accepts.sel:at=every:fail")
        self.assert_fell_back(done, r"sel: fused -> sdpa: refuses this shape \(.*\) .*\(\d+ calls\)")
        self.assertIn("prefill sel: fused -> sdpa", done.out)

    def test_a_failed_launch_on_one_rank_is_agreed_by_all(self):
        done = self.run_with(f"attend.sel:rank={LAST}:at=3:fail", "--set", f"parallel.kv={RANKS}", "--set",
                             "parallel.heads=1")
        self.assert_fell_back(done, rf"sel: fused -> sdpa: {PLACE}")

    def test_in_the_first_step_and_in_prefill(self):
        done = self.run_with("attend.win:fail", "--set", "task.kind=prefill")
        self.assert_fell_back(done, rf"win: fused -> sdpa: {REFUSED}")
        self.assertGreater(int(re.search(r"\((\d+) calls\)", done.out)[1]), 1)

    def test_at_any_call_of_a_run_that_captures_its_step(self):
        """Three calls of the checked pass come first; on a GPU the next one is in the capture of the whole step."""
        for call in range(1, 5):
            with self.subTest(call=call):
                done = self.run_with(f"attend.step:at=every:fail;attend.sel:rank={LAST}:at={call}:fail", "--set",
                                     "run.fill=synthetic", "--set", 'run.modes=["total"]')
                self.assert_fell_back(done, rf"sel: fused -> sdpa: {PLACE}")

    def test_strict_makes_it_an_error(self):
        for fault in "accepts.sel:at=every:fail", f"attend.cmp:rank={LAST}:at=3:fail":
            with self.subTest(fault=fault):
                done = self.run_with(fault, "--strict")
                self.assertEqual(done.code, 3, done.out + done.err)
                self.assertRegex(done.out, r"RESULT: INVALID \(context_64: --strict and a fallback: .* -> sdpa: ")
        self.assert_ok(self.run_with("", "--strict"))

    def test_a_step_that_is_not_launched_at_once_goes_stage_by_stage(self):
        """No fallback: the same kernels. A host has no such step and never asks."""
        done = self.assert_ok(self.run_with("attend.step:at=every:fail", "--strict"))
        self.assertIn("RESULT: VALID", done.out)
        self.assertNotIn("allback", done.out)

    def test_sdpa_itself_has_nothing_to_fall_back_to(self):
        done = self.run_with("attend.sel:at=every:fail", "--set", "route.sel=sdpa")
        self.assertNotIn("fallback", self.assert_ok(done).out)


if __name__ == "__main__":
    if RANKS == 0:
        print("no GPU here: skipped")
        sys.exit(77)
    unittest.main(verbosity=2)
