"""The hooks themselves: that they are in this build, that they fire where they are told, that errors are named."""

import os
import subprocess
import unittest

from fault_sites import sites, traces
from harness import BINARY, SMALL, AppTest


class Hooks(AppTest):
    def run_with(self, fault, *arguments, ranks=2):
        self.write("in.toml", SMALL)
        os.environ["NSA_FAULT"] = fault
        self.addCleanup(os.environ.pop, "NSA_FAULT", None)
        return self.nsa("run", "in.toml", *arguments, ranks=ranks)

    def test_this_build_holds_every_site(self):
        self.assertEqual(traces(BINARY), ["NSA_FAULT:", *sites()])
        symbols = subprocess.run(["nm", "-C", BINARY], capture_output=True, text=True, check=True).stdout
        self.assertIn("nsa::fault::at", symbols)
        self.assertIn("NSA_FAULT", self.nsa("info").out)

    def test_without_a_fault_nothing_happens(self):
        self.assert_ok(self.run_with(""))

    def test_the_named_call_of_the_named_rank_fails(self):
        for fault, code in {"device.allocate:rank=1:at=2:fail": 5, "device.allocate:rank=2:at=2:fail": 0,
                            "device.allocate:rank=1:at=1000000:fail": 0, "device.allocate:at=every:fail": 5,
                            "other.site:kill;device.allocate:fail": 5}.items():
            with self.subTest(fault=fault):
                done = self.run_with(fault, "--output", f"{len(os.listdir(self.folder))}.h5")
                self.assertEqual(done.code, code, done.err)

    def test_kill_ends_the_rank(self):
        self.assertEqual(self.run_with("run.start:rank=1:kill").code, 137)

    def test_errors_are_named(self):
        for fault, why in {"allocate:fail": "it starts with no site", "device.allocate": "it has no action",
                           "device.allocate:explode": 'unknown word "explode"',
                           "device.allocate:at=x:fail": '"x" is no number'}.items():
            with self.subTest(fault=fault):
                done = self.run_with(fault)
                self.assertEqual(done.code, 2)
                self.assertIn(f'NSA_FAULT: "{fault}" ({why})', done.err)


if __name__ == "__main__":
    unittest.main(verbosity=2)
