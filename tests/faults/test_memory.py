"""Memory that runs out, and a device that counts errors, end all ranks alike."""

import os
import unittest

from faulty import DECODE, NEEDLE, PREFILL, FaultTest


class Memory(FaultTest):
    def test_an_allocation_fails_on_one_rank(self):
        for kind, text in (("decode", DECODE), ("prefill", PREFILL), ("needle", NEEDLE)):
            failed = 0
            for call in (1, 2, 3, 5, 9, 16, 40, 80, 120, 200):
                with self.subTest(kind=kind, call=call):
                    done = self.run_with(f"device.allocate:rank=1:at={call}:fail", text)
                    if done.code == 0:
                        break  # there are fewer
                    failed += 1
                    self.assertEqual(done.code, 5, done.err)
                    said = [line for line in done.err.splitlines() if line.startswith("nsa: error")]
                    self.assertEqual(len(said), 1, done.err)
                    self.assertRegex(said[0], r"^nsa: error: out of host memory \(\d+ bytes wanted, \d+ free\); use ")
                    self.assertNotIn("MPI_ABORT", done.err)  # all ranks ended in order
                    self.assertEqual(os.listdir(self.folder), ["in.toml"])
            self.assertGreater(failed, 5)

    def test_a_device_that_fails_ends_the_run(self):
        """As a GPU does whose kernel faulted: one rank's wait for it fails."""
        for text in (DECODE, PREFILL):
            for call in (1, 3, 12, 30):
                with self.subTest(text=text[:25], call=call):
                    done = self.run_with(f"device.synchronize:rank=1:at={call}:fail", text)
                    self.assertEqual(done.code, 5, done.err)
                    said = [line for line in done.err.splitlines() if line.startswith("nsa: ")]
                    self.assertEqual(said, ["nsa: error: the host failed (by NSA_FAULT)"], done.err)
                    left = [name for name in os.listdir(self.folder) if not name.endswith(".json")]
                    self.assertEqual(left, ["in.toml"])

    def test_a_device_with_new_memory_errors_ends_the_run(self):
        for text in (DECODE, PREFILL):
            done = self.run_with("device.ecc:rank=1:at=5:fail", text)
            for call in range(6, 20):
                if done.code != 0:
                    break
                done = self.run_with(f"device.ecc:rank=1:at={call}:fail", text)
            self.assertEqual(done.code, 5, done.err)
            self.assertRegex(done.err, r"nsa: error: rank 1 \(.*\) has 1 new uncorrected memory errors \(ECC\)")
            self.assertFalse(os.path.exists(os.path.join(self.folder, "r.h5")))


if __name__ == "__main__":
    unittest.main(verbosity=2)
