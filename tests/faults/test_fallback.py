"""An implementation that refuses the shape or cannot be launched: sdpa's answer, counted and visible everywhere."""

import os
import re
import unittest

from harness import SMALL, AppTest


class Fallback(AppTest):
    def run_with(self, fault, *arguments, ranks=2):
        self.write("in.toml", SMALL)
        os.environ["NSA_FAULT"] = fault
        self.addCleanup(os.environ.pop, "NSA_FAULT", None)
        return self.nsa("run", "in.toml", "--output", f"{len(os.listdir(self.folder))}.h5", *arguments, ranks=ranks)

    def assert_fell_back(self, done, line):
        self.assert_ok(done)
        self.assertIn("RESULT: VALID", done.out)
        self.assertRegex(done.out, line)
        self.assertRegex(done.out, r"\n +64 .*  FALLBACK\n")

    def test_a_refused_shape(self):
        done = self.run_with("accepts.sel:at=every:fail")
        self.assert_fell_back(done, r"fallback at context_64: sel: fused -> sdpa: refuses this shape \(.*\) .*\(\d+ calls\)")
        self.assertIn("prefill sel: fused -> sdpa", done.out)

    def test_a_failed_launch_on_one_rank_is_agreed_by_all(self):
        done = self.run_with("attend.sel:rank=1:at=7:fail", "--set", "parallel.kv=2", "--set", "parallel.heads=1")
        self.assert_fell_back(done, r"sel: fused -> sdpa: launch refused \(by NSA_FAULT\) on rank 1 \(\d+ calls\)")

    def test_in_the_first_step_and_in_prefill(self):
        done = self.run_with("attend.win:fail", "--set", "task.kind=prefill")
        self.assert_fell_back(done, r"win: fused -> sdpa: launch refused")
        self.assertGreater(int(re.search(r"\((\d+) calls\)", done.out)[1]), 1)

    def test_strict_makes_it_an_error(self):
        for fault in "accepts.sel:at=every:fail", "attend.cmp:rank=1:at=5:fail":
            with self.subTest(fault=fault):
                done = self.run_with(fault, "--strict")
                self.assertEqual(done.code, 3, done.out + done.err)
                self.assertRegex(done.out, r"RESULT: INVALID \(context_64: --strict and a fallback: .* -> sdpa: ")
        self.assert_ok(self.run_with("", "--strict"))

    def test_sdpa_itself_has_nothing_to_fall_back_to(self):
        done = self.run_with("attend.sel:at=every:fail", "--set", "route.sel=sdpa")
        self.assertNotIn("fallback", self.assert_ok(done).out)


if __name__ == "__main__":
    unittest.main(verbosity=2)
