"""Bad input on the real binary: the right exit code, one message with the position, no file left, no hang.

Every case runs without a launcher and on two ranks."""

import os
import unittest

from harness import SMALL, AppTest

USAGE, FILE = 2, 6


class BadInput(AppTest):
    def refuses(self, code, parts, *arguments, ranks=(0, 2), command="run"):
        """Exactly one message on stderr, holding all `parts`; the folder stays as it was."""
        before = self.contents()
        for count in ranks:
            with self.subTest(arguments=arguments, ranks=count):
                done = self.nsa(command, *arguments, ranks=count)
                self.assertEqual(done.code, code, done.out + done.err)
                self.assertEqual(done.err.count("nsa: "), 1, done.err)
                self.assertEqual(done.err.count("nsa: error: "), 1, done.err)
                for part in parts:
                    self.assertIn(part, done.err)
                self.assertNotIn("RESULT", done.out)
                self.assertEqual(self.contents(), before)

    def contents(self):
        found = {}
        for folder, _, files in os.walk(self.folder):
            for name in files:
                path = os.path.join(folder, name)
                found[os.path.relpath(path, self.folder)] = (os.path.getsize(path), os.path.getmtime(path))
        return found

    # The command line

    def test_command_line(self):
        self.refuses(USAGE, ["INPUT is required; see nsa run --help"])
        self.refuses(USAGE, ["--rank (did you mean --ranks?); see nsa run --help"], "in.toml", "--dry-run", "--rank")
        self.refuses(USAGE, ["(did you mean --output?)"], "in.toml", "--outptu=x")
        self.refuses(USAGE, ["unknown command rum (did you mean run?)"], command="rum")
        self.write("in.toml", SMALL)
        self.refuses(USAGE, ["--no-such-option"], "in.toml", "--no-such-option")
        self.refuses(USAGE, ["--dry-run"], "in.toml", "--ranks", "4")
        self.refuses(USAGE, ["unknown command runn", "run, gate, report, diff, info"], "in.toml", command="runn")

    def test_no_such_input(self):
        self.refuses(USAGE, ["cannot read none.toml (No such file or directory)"], "none.toml")
        self.refuses(USAGE, ["cannot read . (not a file)"], ".")

    # The input

    def test_syntax_error(self):
        self.write("in.toml", SMALL + "seed = = 1\n")
        self.refuses(USAGE, ["in.toml:14:8: not TOML"], "in.toml")

    def test_unknown_key_names_the_nearest(self):
        self.write("in.toml", SMALL + "contxt = 64\n")
        self.refuses(USAGE, ["in.toml:14:1: unknown key run.contxt; did you mean context in [run]?"], "in.toml")
        self.write("in.toml", SMALL)
        self.refuses(USAGE, ["--set run.contxt=64: unknown key run.contxt; did you mean context in [run]?"],
                     "in.toml", "--set", "run.contxt=64")
        self.write("in.toml", SMALL + "[ruin]\n")
        self.refuses(USAGE, ["in.toml:14:2: unknown section [ruin]; did you mean [run]?"], "in.toml")

    def test_wrong_type(self):
        self.write("in.toml", SMALL + 'seed = "one"\n')
        self.refuses(USAGE, ['in.toml:14:8: run.seed holds the string "one"; give an integer'], "in.toml")
        self.write("in.toml", SMALL.replace("fp32", "fp8"))
        said = ['in.toml:7:13: model.precision holds the string "fp8"', '"fp32", "bf16", "fp16"']
        self.refuses(USAGE, said, "in.toml")

    def test_every_violated_constraint_at_once(self):
        text = SMALL.replace("d_k = 16", "d_k = 15").replace("steps = 3", "steps = 1")
        self.write("in.toml", text + "[nsa]\nd = 24\nn_sel = 2\n[parallel]\nheads = 3\n")
        self.refuses(USAGE, ["7 problems in the input",
                             "in.toml:5:1: model.d_k = 15 must be even",
                             "in.toml:12:1: run.warmup = 1 must be less than run.steps = 1",
                             "in.toml:15:1: nsa.d = 24 must divide nsa.l = 32",
                             "in.toml:15:1: nsa.d = 24 must divide nsa.l_sel = 64",
                             "in.toml:16:1: nsa.n_sel = 2 must be at least",
                             "in.toml:18:1: parallel.heads = 3 must divide model.n_kv_groups = 2",
                             "--set needle.depths=2: needle.depths = 2 is out of range"],
                     "in.toml", "--set", "needle.depths=2")

    def test_trace_of_a_batch(self):
        batch = '[batch]\ndistribution = "file"\nfile = "trace.csv"\n'
        self.write("in.toml", SMALL.replace("context = 64\n", "") + batch)
        self.refuses(FILE, ["cannot read batch.file = trace.csv (no such file)"], "in.toml")
        self.refuses(FILE, ["cannot read batch.file = . (it is a folder)"], "in.toml", "--set", "batch.file='.'")
        self.write("trace.csv", "prompt,output\n4096,12\n-7,3\n")
        self.refuses(FILE, ['trace.csv:3: "-7" is no number of tokens; give 1 to'], "in.toml")
        self.refuses(FILE, ['trace.csv:3: "-7" is no number of tokens'], "in.toml", "--dry-run", ranks=(0,))
        self.write("trace.csv", "")
        self.refuses(FILE, ["trace.csv:1: no request"], "in.toml")
        self.write("trace.csv", "prompt,output\n40,12\n")
        self.refuses(USAGE, ["holds 1 requests, fewer than run.batch = 2"], "in.toml", "--set", "run.batch=2")

    def test_heads_times_kv_is_not_the_rank_count(self):
        self.write("in.toml", SMALL + "[parallel]\nheads = 2\nkv = 3\n")
        self.refuses(USAGE, ["parallel.heads = 2, parallel.kv = 3 need 6 ranks"], "in.toml")

    def test_no_such_backend(self):
        self.write("in.toml", SMALL)
        if "no (NSA_CUDA=OFF)" not in self.nsa("info").out:
            self.skipTest("this build has CUDA")
        self.refuses(USAGE, ["this build has no CUDA"], "in.toml", "--set", "run.backend=cuda")

    # [input] file. What else does not fit, NaN among it: test_input_file.py, which writes files with h5py.

    def given(self, **changes):
        """x.h5, dumped by a run of SMALL, and an input that reads it."""
        self.write("in.toml", SMALL)
        self.assert_ok(self.nsa("run", "in.toml", "--output", "x.h5", "--set", "output.tensors=true"))
        text = SMALL
        for key, value in changes.items():
            text = text.replace(f"{key} = 32", f"{key} = {value}")
        self.write("in.toml", text + '[input]\nfile = "x.h5"\n')

    def test_a_route_this_backend_does_not_have(self):
        self.write("in.toml", SMALL)
        self.refuses(USAGE, ['route.sel holds the string "flash"'], "in.toml", "--set", 'route.sel="flash"')

    def test_missing_input_file(self):
        self.write("in.toml", SMALL + '[input]\nfile = "none.h5"\n')
        self.refuses(FILE, ["none.h5", "no such file"], "in.toml")

    def test_malformed_input_file(self):
        self.write("x.h5", "not HDF5 at all\n" * 100)
        self.write("in.toml", SMALL + '[input]\nfile = "x.h5"\n')
        self.refuses(FILE, ["x.h5"], "in.toml")

    def test_truncated_input_file(self):
        self.given()
        path = os.path.join(self.folder, "x.h5")
        os.truncate(path, os.path.getsize(path) // 2)
        self.refuses(FILE, ["x.h5"], "in.toml")

    def test_input_of_another_shape(self):
        self.given(dim=48)
        self.refuses(FILE, ["x.h5", "32", "48"], "in.toml")

    def test_input_that_is_too_short(self):
        self.given()
        self.refuses(FILE, ["x.h5", "[1, 67, 32]"], "in.toml", "--set", "run.context=80")

    # The output

    def test_output_exists(self):
        self.write("in.toml", SMALL)
        self.write("result.h5", "precious")
        self.refuses(FILE, ["result.h5 exists (results are never overwritten)"], "in.toml")

    def test_output_cannot_be_written(self):
        self.write("in.toml", SMALL)
        self.refuses(FILE, ["no folder none"], "in.toml", "--output", "none/result.h5")
        self.refuses(FILE, ["in.toml is not a folder"], "in.toml", "--output", "in.toml/result.h5")
        self.refuses(FILE, ["cannot write /proc/result.h5"], "in.toml", "--output", "/proc/result.h5")
        self.refuses(FILE, ["cannot write none/a.csv"], "in.toml", "--csv", "none/a.csv")

    def test_output_in_a_folder_without_permission(self):
        if os.geteuid() == 0:
            self.skipTest("root may write everywhere")
        self.write("in.toml", SMALL)
        os.mkdir(os.path.join(self.folder, "closed"), 0o555)
        self.refuses(FILE, ["cannot write closed/result.h5"], "in.toml", "--output", "closed/result.h5")

    def test_no_room_for_the_output_is_found_before_computing(self):
        # 16 PB of tensors: computing them first would not end before the test is called hung.
        self.write("in.toml", SMALL.replace("dim = 32", "dim = 4096").replace("context = 64", "context = 1000000000"))
        self.refuses(FILE, ["cannot write result.h5", "are needed", "are free"], "in.toml", "--set",
                     "output.tensors=true")

    def test_no_room_on_a_small_file_system(self):
        small = os.path.join(self.folder, "small")
        os.mkdir(small)
        if os.system(f"mount -t tmpfs -o size=64k none {small} 2>/dev/null") != 0:
            self.skipTest("mounting a small file system needs root and the right to mount")
        self.addCleanup(os.system, f"umount {small}")
        self.write("in.toml", SMALL)
        self.refuses(FILE, ["cannot write small/result.h5", "are needed", "are free"], "in.toml", "--output",
                     "small/result.h5")


class BadFilesOfDiff(AppTest):
    def test_diff_names_the_file_it_cannot_read(self):
        self.write("broken.h5", "not HDF5")
        for arguments, code, part in ((("none.h5", "none.h5"), FILE, "none.h5"),
                                      (("broken.h5", "none.h5"), FILE, "broken.h5"),
                                      (("none.h5",), USAGE, "B is required")):
            done = self.nsa("diff", *arguments)
            self.assertEqual(done.code, code, done.err)
            self.assertEqual(done.err.count("nsa: error: "), 1, done.err)
            self.assertIn(part, done.err)


if __name__ == "__main__":
    unittest.main(verbosity=2)
