"""Memory that runs out ends all ranks alike; a bit that flips makes the point INVALID."""

import os
import re
import unittest

from harness import SMALL, AppTest

LAYERS = SMALL + "[parallel]\nheads = 1\nkv_chunk_blocks = 1\n"
PREFILL = LAYERS.replace('"decode"', '"prefill"').replace("context = 64", "context = 256")
NEEDLE = LAYERS.replace('"decode"', '"needle"').replace("context = 64", "context = 256")


class WithFaults(AppTest):
    def run_with(self, fault, text=LAYERS, ranks=2):
        self.write("in.toml", text)
        os.environ["NSA_FAULT"] = fault
        self.addCleanup(os.environ.pop, "NSA_FAULT", None)
        if os.path.exists(os.path.join(self.folder, "r.h5")):
            os.remove(os.path.join(self.folder, "r.h5"))
        return self.nsa("run", "in.toml", "--deadline", "60", "--output", "r.h5", ranks=ranks)


class Memory(WithFaults):
    def test_every_allocation_may_fail_on_one_rank(self):
        for kind, text in (("decode", LAYERS), ("prefill", PREFILL), ("needle", NEEDLE)):
            failed = 0
            for call in (1, 2, 3, 5, 9, 16, 27, 40, 55, 80, 110, 150, 200):
                with self.subTest(kind=kind, call=call):
                    done = self.run_with(f"device.allocate:rank=1:at={call}:fail", text)
                    if done.code == 0:
                        break  # there are fewer
                    failed += 1
                    self.assertEqual(done.code, 5, done.err)
                    said = [line for line in done.err.splitlines() if line.startswith("nsa:")]
                    self.assertEqual(len(said), 1, done.err)
                    self.assertRegex(said[0], r"^nsa: error: out of host memory \(\d+ bytes wanted, \d+ free\); use ")
                    self.assertNotIn("MPI_ABORT", done.err)  # all ranks ended in order
                    self.assertEqual(os.listdir(self.folder), ["in.toml"])
            self.assertGreater(failed, 5)

    def test_a_device_with_new_memory_errors_ends_the_run(self):
        for text in (LAYERS, PREFILL):
            done = self.run_with("device.ecc:rank=1:at=5:fail", text)
            for call in range(6, 20):
                if done.code != 0:
                    break
                done = self.run_with(f"device.ecc:rank=1:at={call}:fail", text)
            self.assertEqual(done.code, 5, done.err)
            self.assertRegex(done.err, r"nsa: error: rank 1 \(.*\) has 1 new uncorrected memory errors \(ECC\)")
            self.assertFalse(os.path.exists(os.path.join(self.folder, "r.h5")))


class Flips(WithFaults):
    def invalid(self, fault, reason, text=LAYERS, ranks=2):
        done = self.run_with(fault, text, ranks)
        self.assertEqual(done.code, 3, f"{fault}\n{done.out}{done.err}")
        self.assertRegex(done.out.splitlines()[-1], rf"^RESULT: INVALID \(.*{reason}")
        self.assertRegex(done.out, re.compile(r"^ +\d+ .*INVALID|INVALID", re.MULTILINE))  # in the table too

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
        for text in (LAYERS, PREFILL):
            for call in (1, 2, 3):  # the branches of the checked pass' first step or tile
                # of the first step, or in prefill of the first tile's last row: the rows that are checked
                for number in (0, 40) if text is LAYERS else (63 * 64 + 32, 63 * 64 + 40):
                    with self.subTest(text=text[:25], call=call, number=number):
                        self.invalid(f"kernel.attend:rank=0:at={call}:flip={32 * number + 30}", "", text)

    def test_in_the_combined_output_of_the_checked_pass(self):
        for call in (1, 3):
            with self.subTest(call=call):
                self.invalid(f"kernel.combine:rank=0:at={call}:flip={32 * 5 + 30}", "", LAYERS)

    def test_in_the_output_of_a_measured_pass(self):
        for site in ("kernel.combine", "kernel.output"):
            with self.subTest(site=site):
                self.invalid(f"{site}:rank=0:at=6:flip={32 * 5 + 30}", "a measured step gave another output|not finite",
                             LAYERS, ranks=1)

    def test_in_the_choice_of_a_measured_pass(self):
        # 3 checked steps, 3 steps of branches, 3 of total; which of 32 blocks stands first is turned.
        text = LAYERS.replace("context = 64", "context = 2048") + "[nsa]\nn_sel = 4\n"
        for call in (4, 5, 7):  # not in the last step of a pass, whose output is compared
            with self.subTest(call=call):
                self.invalid(f"kernel.rank:rank=0:at={call}:flip={32 + 2}", "a measured pass chose other blocks", text,
                             ranks=1)

    def test_in_a_counter(self):
        for text in (LAYERS, PREFILL):
            for call in ((10, 12, 14) if text is LAYERS else (25, 26, 27)):
                with self.subTest(text=text[:25], call=call):
                    self.invalid(f"kernel.reads:rank=1:at={call}:flip=2", "reads (of|are counted)", text)

    def test_without_a_flip_nothing_is_found(self):
        for text in (LAYERS, PREFILL):
            for ranks in (1, 2):
                self.assert_ok(self.run_with("", text, ranks))


if __name__ == "__main__":
    unittest.main(verbosity=2)
