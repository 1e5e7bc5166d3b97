"""A disturbed measurement is NOISY wherever its times are shown, and decides nothing. Its result is VALID."""

import json
import os
import re
import unittest

from faulty import DECODE, FaultTest

INPUT = DECODE.replace("steps = 3", "steps = 24").replace("warmup = 1", 'warmup = 8\nmodes = ["total"]')
SLOW_STEP = "decode.step:rank=1:at=20:delay=0.044"
# The injected delay, and what a busy machine adds.
WHY = r"total: \d+ of 16 samples above 3 x the median took \d+% of the time \(largest (?:\S+) m?s, median [^)]*\)"
INCONCLUSIVE, TOO_SLOW = 11, 1


class Noise(FaultTest):
    def test_a_slow_step_among_fast_ones(self):
        done = self.assert_ok(self.run_with(SLOW_STEP, INPUT))
        self.assertRegex(done.out, re.compile(r"^ +64 .*  NOISY$", re.MULTILINE))
        self.assertRegex(done.out, rf"\nnoisy at context_64: {WHY}; \d+ involuntary context switches, \d+ page fault")
        largest, unit = re.search(r"\(largest (\S+) (m?s),", done.out).groups()
        self.assertGreaterEqual(float(largest) * (1000 if unit == "s" else 1), 44)
        self.assertRegex(done.out, r"\nNOISY: 1 of 1 points; .*\nRESULT: VALID\n")
        with open(os.path.join(self.folder, "r.h5"), "rb") as file:
            self.assertRegex(file.read(), WHY.encode())

        report = self.assert_ok(self.nsa("report", "r.h5"))
        self.assertEqual(report.out.split("\n", 1)[1], done.out.replace("result: r.h5\n", ""))
        diff = self.assert_ok(self.nsa("diff", "r.h5", "r.h5"))
        self.assertRegex(diff.out, rf"\n  A is noisy: {WHY}")
        self.assertRegex(diff.out, r"\n  total +step .*  UNCLEAR \(NOISY\)\n")
        self.assertIn("\nTIMES: 0 SAME 0 FASTER 0 SLOWER 1 UNCLEAR of 1 series\n", diff.out)

    def test_the_json_names_it(self):
        os.environ["NSA_FAULT"] = SLOW_STEP
        self.addCleanup(os.environ.pop, "NSA_FAULT")
        self.write("in.toml", INPUT)
        self.assert_ok(self.nsa("run", "in.toml", "--json", "r.json", ranks=2))
        with open(os.path.join(self.folder, "r.json")) as file:
            (line,) = json.load(file)["noisy"]
        self.assertRegex(line, rf"^context_64: {WHY}")

    def test_the_gate_does_not_decide_by_it(self):
        text = INPUT.replace('["total"]', '["branches", "total", "ablation"]') + '[route]\nsel = "sdpa"\n'
        self.assert_ok(self.run_with("decode.step:at=20:delay=0.5", text, ranks=0))  # in mode branches
        page = self.nsa("gate", "r.h5", "--exit-verdict")
        self.assertEqual(page.code, INCONCLUSIVE, page.out + page.err)
        self.assertRegex(page.out, r"open.*\n*.*NOISY \(branches: \d+ of 16 samples above 3 x the median")

    def test_a_pass_at_a_lowered_clock_is_measured_again(self):
        """On all ranks where it was low on one; the samples of a mode are those of the passes that count."""
        text = INPUT.replace("warmup = 8", "warmup = 8\nrecovery_delay = 0.01")
        for at, passes in ("1", 1), ("every", 20):  # 20 times at most: then it counts
            done = self.assert_ok(self.run_with(f"noise.clock:rank=1:at={at}:shorten=74", text))
            self.assertIn(f"\nmeasured again at context_64: total: {passes} passes at a lowered clock\n", done.out)
            self.assertIn("RESULT: VALID\n", done.out)
        for fault, settings in ("noise.clock:at=every:shorten=76", ""), ("noise.clock:at=every:shorten=10",
                                                                         "\nthrottle_threshold = 0"):
            changed = text.replace("delay = 0.01", "delay = 0.01" + settings)
            done = self.assert_ok(self.run_with(fault, changed, ranks=0))
            self.assertNotIn("measured again", done.out)

    def test_a_program_that_is_slower_fails_above(self):
        for name, delay in (("a.h5", 0.02), ("b.h5", 0.04)):
            self.assert_ok(self.run_with(f"decode.step:at=every:delay={delay}", INPUT, ranks=0))
            os.rename(os.path.join(self.folder, "r.h5"), os.path.join(self.folder, name))
        done = self.nsa("diff", "a.h5", "b.h5", "--fail-above", "50%")
        if "NOISY" in done.out:
            self.skipTest("a busy machine")
        self.assertEqual(done.code, TOO_SLOW, done.out)
        self.assertRegex(done.out, r"\nSLOWER than allowed: decode, context 64, .*: total step takes \S+ times ")
        self.assertRegex(done.out, r"\nTIMES: 0 SAME 0 FASTER 1 SLOWER 0 UNCLEAR of 1 series\nDIFF: SAME ")
        self.assert_ok(self.nsa("diff", "a.h5", "b.h5", "--fail-above", "150%"))
        self.assertIn("1 FASTER", self.assert_ok(self.nsa("diff", "b.h5", "a.h5", "--fail-above", "0%")).out)

    def test_a_copy_rate_that_cannot_be(self):
        shape = INPUT.replace("dim = 32", "dim = 512\nn_heads = 8").replace("context = 64", "context = 2048")
        done = self.assert_ok(self.run_with("measure.copy:at=every:delay=1.0", shape, ranks=0))
        rate = float(re.search(r"FOM decode_copy_rate_context_2048 = (\S+) %", done.out)[1])
        if rate <= 2000:  # a machine whose step is slow for another reason
            self.skipTest(f"the copy rate is {rate}%")
        self.assertRegex(done.out, r"noisy at context_2048: copy rate \d+%: at most 2000% is possible; the copy of ")


if __name__ == "__main__":
    unittest.main(verbosity=2)
