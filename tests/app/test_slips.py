"""Slips of the hand on the real binary: nothing that exists is lost, and the message says what to do."""

import os
import shutil
import unittest

from harness import SMALL, AppTest

USAGE, FILE = 2, 6


class SlipsTest(AppTest):
    def setUp(self):
        super().setUp()
        self.write("in.toml", SMALL)

    def path(self, name):
        return os.path.join(self.folder, name)

    def content(self):
        """{name: bytes} of the folder; links as what they lead to."""
        found = {}
        for name in os.listdir(self.folder):
            if os.path.isfile(self.path(name)):
                with open(self.path(name), "rb") as file:
                    found[name] = file.read()
        return found

    def refuses(self, code, parts, *arguments, ranks=0):
        """One message that holds all `parts`; every file keeps its bytes, and none is added."""
        before = self.content()
        done = self.nsa(*arguments, ranks=ranks)
        with self.subTest(arguments=arguments):
            self.assertEqual(done.code, code, done.out + done.err)
            self.assertEqual(done.err.count("nsa: error: "), 1, done.err)
            for part in parts:
                self.assertIn(part, done.err)
            self.assertNotIn("RESULT", done.out)
            self.assertEqual(self.content(), before)


class WrittenFiles(SlipsTest):
    """A file that a command writes is none that it reads, and no other one that it writes, whatever it is called."""

    def test_a_side_output_is_the_result_file(self):
        why = "it is the result file); choose another"
        os.symlink("n.h5", self.path("link.h5"))
        os.symlink(".", self.path("here"))
        for side, *option in (("./n.h5", "--csv", "./n.h5"), (self.path("n.h5"), "--json", self.path("n.h5")),
                              ("n.h5", "--set", 'output.csv="n.h5"'), ("link.h5", "--csv", "link.h5"),
                              ("here/n.h5", "--json", "here/n.h5")):
            self.refuses(FILE, [f"cannot write {side} ({why}"], "run", "in.toml", "--output", "n.h5", *option)
        self.refuses(FILE, [why], "run", "in.toml", "--output", "n.h5", "--csv", "./n.h5", ranks=2)
        self.assert_ok(self.nsa("run", "in.toml", "--output", "n.h5"))
        os.link(self.path("n.h5"), self.path("hard"))
        for side in ("n.h5", "hard"):
            self.refuses(FILE, [why], "run", "in.toml", "--resume", "--output", "n.h5", "--csv", side)

    def test_two_side_outputs_are_one(self):
        self.refuses(FILE, ["cannot write ./x.txt (it is the CSV); choose another --json"],
                     "run", "in.toml", "--csv", "x.txt", "--json", "./x.txt")

    def test_a_written_file_is_the_input(self):
        for option in ("--csv", "--json"):
            self.refuses(FILE, ["cannot write ./in.toml (it is the input)"], "run", "in.toml", option, "./in.toml")
        self.refuses(FILE, ["it is the input"], "run", "in.toml", "--resume", "--output", "in.toml")
        self.assert_ok(self.nsa("run", "in.toml", "--output", "x.h5", "--set", "output.tensors=true"))
        given = ("--set", 'input.file="x.h5"')
        for option in ("--csv", "--json"):
            self.refuses(FILE, ["(it is [input] file)"], "run", "in.toml", *given, option, "x.h5")
        self.refuses(FILE, ["(it is [input] file); choose another --output"], "run", "in.toml", *given, "--resume",
                     "--output", "x.h5")

    def test_a_text_never_replaces_hdf5(self):
        self.assert_ok(self.nsa("run", "in.toml", "--output", "x.h5"))
        with open(self.path("x.h5"), "rb") as file:
            self.write("behind", "")
            with open(self.path("behind"), "wb") as copy:
                copy.write(b"#" * 512 + file.read())  # a user block
        for side in ("x.h5", "behind"):
            for option in ("--csv", "--json"):
                self.refuses(FILE, ["(it is an HDF5 file)"], "run", "in.toml", option, side)
        shutil.copy(self.path("x.h5"), self.path("y.h5"))
        self.refuses(FILE, ["cannot write y.h5 (it is an HDF5 file); choose another --adr"], "gate", "x.h5", "--adr",
                     "y.h5")

    def test_the_decision_record_is_an_input(self):
        self.assert_ok(self.nsa("run", "in.toml", "--output", "x.h5", "--csv", "x.csv"))
        self.refuses(FILE, ["cannot write ./x.h5 (it is an input)"], "gate", "x.h5", "--adr", "./x.h5")
        self.refuses(FILE, ["cannot write ./x.csv (it is an input)"], "gate", "x.csv", "--adr", "./x.csv")

    def test_what_is_no_file_is_called_so(self):
        self.refuses(FILE, ["cannot write /dev/stdout (not a plain file)"], "run", "in.toml", "--json", "/dev/stdout")
        self.refuses(FILE, ["cannot write . (it is a folder)"], "run", "in.toml", "--json", ".")

    def test_a_link_to_a_file_that_is_not_there_yet_is_followed(self):
        os.mkdir(self.path("there"))
        for name in ("r.h5", "c.csv", "j.json"):
            os.symlink("there/" + name, self.path(name))
        self.assert_ok(self.nsa("run", "in.toml", "--resume", "--output", "r.h5", "--csv", "c.csv", "--json", "j.json"))
        self.assertEqual(sorted(os.listdir(self.path("there"))), ["c.csv", "j.json", "r.h5"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
