"""A bit that flips makes the point INVALID."""

import os
import re
import unittest

from faulty import DECODE, PREFILL, FaultTest


class Flips(FaultTest):
    def invalid(self, fault, reason, text=DECODE, ranks=2):
        done = self.run_with(fault, text, ranks)
        self.assertEqual(done.code, 3, f"{fault}\n{done.out}{done.err}")
        self.assertRegex(done.out.splitlines()[-1], rf"^RESULT: INVALID \(.*{reason}")
        self.assertRegex(done.out, re.compile(r"^ +\d+ .*  INVALID$", re.MULTILINE))  # in the table too

    def test_in_a_cached_key_or_value(self):
        for site in ("cache.k", "cache.v"):
            for call in (1, 4):
                for bit in (0, 7, 30, 16 * 32 + 22):  # the lowest bit of a mantissa is enough
                    with self.subTest(site=site, call=call, bit=bit):
                        # The first reason stands: a high bit shows in the step's output before.
                        first = "" if bit < 16 else "|a measured step gave another output|the output is not finite"
                        self.invalid(f"{site}:rank=0:at={call}:flip={bit}",
                                     f"rank 0: (the cached K or V changed{first})")

    def test_in_a_key_of_prefill(self):
        for call in (1, 2, 4):  # the checked run, and measured ones
            with self.subTest(call=call):
                self.invalid(f"cache.k:rank=1:at={call}:flip=3", "rank 1: K or V differs", PREFILL)

    def test_in_what_attention_leaves(self):
        for text in (DECODE, PREFILL):
            for call in (1, 2, 3):  # the branches of the checked pass' first step or tile
                # of the first step, or in prefill of the first tile's last row: the rows that are checked
                for number in (0, 40) if text is DECODE else (63 * 64 + 32, 63 * 64 + 40):
                    with self.subTest(text=text[:25], call=call, number=number):
                        self.invalid(f"kernel.attend:rank=0:at={call}:flip={32 * number + 30}",
                                     r"error \S+ against float64 exceeds", text)

    def test_in_the_combined_output_of_the_checked_pass(self):
        for call in (1, 3):
            with self.subTest(call=call):
                self.invalid(f"kernel.combine:rank=0:at={call}:flip={32 * 5 + 30}", "", DECODE)

    def test_in_the_output_of_a_measured_pass(self):
        for site in ("kernel.combine", "kernel.output"):
            with self.subTest(site=site):
                self.invalid(f"{site}:rank=0:at=6:flip={32 * 5 + 30}", "a measured step gave another output|not finite",
                             DECODE, ranks=1)

    def test_in_the_choice_of_a_measured_pass(self):
        # 3 checked steps, 3 steps of branches, 3 of total; which of 32 blocks stands first is turned.
        text = DECODE.replace("context = 64", "context = 2048") + "[nsa]\nn_sel = 4\n"
        for call in (4, 5, 7):  # not in the last step of a pass, whose output is compared
            with self.subTest(call=call):
                self.invalid(f"kernel.rank:rank=0:at={call}:flip={32 + 2}", "a measured pass chose other blocks", text,
                             ranks=1)

    def test_in_a_counter(self):
        for text in (DECODE, PREFILL):
            for call in ((10, 12, 14) if text is DECODE else (25, 26, 27)):
                with self.subTest(text=text[:25], call=call):
                    self.invalid(f"kernel.reads:rank=1:at={call}:flip=2", "reads (of|are counted)", text)

    def test_the_file_says_it_too(self):
        for text, site in ((DECODE, "cache.k:rank=0:at=1"), (PREFILL, "cache.k:rank=1:at=2")):
            with self.subTest(text=text[:25]):
                self.invalid(f"{site}:flip=3", "", text)
                os.environ["NSA_FAULT"] = ""
                # Shows the file; no point is run.
                shown = self.nsa("run", "in.toml", "--resume", "--output", "r.h5", ranks=2)
                self.assertEqual(shown.code, 3, shown.out + shown.err)
                self.assertIn("r.h5 is complete", shown.out)
                self.assertRegex(shown.out, re.compile(r"^ +\d+ .*  INVALID$", re.MULTILINE))
                self.assertRegex(shown.out.splitlines()[-1], r"^RESULT: INVALID \(.*K or V")

    def test_without_a_flip_nothing_is_found(self):
        for text in (DECODE, PREFILL):
            for ranks in (1, 2):
                self.assert_ok(self.run_with("", text, ranks))


if __name__ == "__main__":
    unittest.main(verbosity=2)
