"""Runs of the binary with faults built in."""

import os

from harness import SMALL, AppTest

DECODE = SMALL + "[parallel]\nheads = 1\nkv_chunk_blocks = 1\n"
PREFILL = DECODE.replace('"decode"', '"prefill"').replace("context = 64", "context = 256")
NEEDLE = DECODE.replace('"decode"', '"needle"').replace("context = 64", "context = 256")


class FaultTest(AppTest):
    def run_with(self, fault, text=DECODE, ranks=2):
        self.write("in.toml", text)
        os.environ["NSA_FAULT"] = fault
        self.addCleanup(os.environ.pop, "NSA_FAULT", None)
        if os.path.exists(os.path.join(self.folder, "r.h5")):
            os.remove(os.path.join(self.folder, "r.h5"))
        return self.nsa("run", "in.toml", "--deadline", "60", "--output", "r.h5", ranks=ranks)
