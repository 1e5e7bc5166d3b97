"""A correct result is VALID whatever the size of its values. Needs h5py."""

import os
import unittest

import h5py

from harness import SMALL, AppTest


class Magnitudes(AppTest):
    def given(self, factors, precision):
        """x.h5: q, k, v and gates of a run, each times its factor; the input reads it."""
        self.write("in.toml", SMALL.replace("fp32", precision) + 'scope = "attention"\n[input]\nfile = "x.h5"\n')
        done = self.nsa("run", "in.toml", "--output", "x.h5", "--set", 'input.file=""', "--set", "output.tensors=true")
        self.assert_ok(done)
        with h5py.File(os.path.join(self.folder, "x.h5"), "r+") as file:
            given = file["points/0000/tensors/given"]
            for name in given:
                if isinstance(given[name], h5py.Dataset) and name[0] in factors and name[1:2] in ("", "_"):
                    given[name][...] = given[name][...] * factors[name[0]]

    def test_correct_results_of_any_size_are_valid(self):
        for precision, factors in (("bf16", {"q": 5, "k": 5, "v": 5}), ("fp32", {"q": 8, "k": 8, "v": 8}),
                                   ("fp32", {"v": 1e5}), ("bf16", {"v": 1e5}), ("fp16", {"v": 1e3}),
                                   ("fp32", {"q": 40, "k": 40}), ("fp32", {"v": 1e-6}), ("bf16", {"v": 1e-30}),
                                   ("fp16", {"v": 1e-6}), ("fp32", {"v": 0})):
            with self.subTest(precision=precision, factors=factors):
                for name in os.listdir(self.folder):
                    os.remove(os.path.join(self.folder, name))
                self.given(factors, precision)
                done = self.nsa("run", "in.toml", "--output", "y.h5")
                self.assertEqual(done.code, 0, done.out + done.err)


if __name__ == "__main__":
    unittest.main(verbosity=2)
