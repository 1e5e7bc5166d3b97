"""Slips of the hand on the real binary: nothing that exists is lost, and the message says what to do."""

import json
import os
import re
import resource
import shutil
import subprocess
import unittest
import unittest.mock

from harness import BINARY, MPIEXEC, SMALL, AppTest, Finished

USAGE, DEVICE, FILE = 2, 5, 6


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


class Streams(SlipsTest):
    def test_an_output_that_cannot_be_written_is_an_error(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full")
        self.assert_ok(self.nsa("run", "in.toml", "--output", "a.h5"))
        commands = (["run", "in.toml", "--output", "b.h5"], ["run", "in.toml", "--dry-run"], ["report", "a.h5"],
                    ["diff", "a.h5", "a.h5"], ["gate", "a.h5"], ["info"], ["info", "--keys"], ["--help"], ["--version"])
        for command in commands:
            with self.subTest(command=command), open("/dev/full", "w") as full:
                done = subprocess.run([BINARY, *command], cwd=self.folder, stdout=full, stderr=subprocess.PIPE,
                                      text=True)
                self.assertEqual(done.returncode, FILE, done.stderr)
                self.assertEqual(done.stderr.count("nsa: error: cannot write the standard output (No space left"), 1)
        self.assert_ok(self.nsa("report", "b.h5"))  # the run itself is whole

    def test_a_reader_that_goes_away_ends_no_run(self):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([BINARY, "run", "in.toml", "--set", "run.context=[64, 65]"], cwd=self.folder,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=write, stderr=subprocess.PIPE,
                              text=True)  # fmt: skip
        os.close(write)
        self.assertEqual(done.returncode, FILE, done.stderr)
        self.assertEqual(done.stderr.count("nsa: error: cannot write the standard output (Broken pipe)"), 1)
        self.assertIn("RESULT: VALID", self.assert_ok(self.nsa("report", "result.h5")).out)
        self.assertIn("is complete: 2 points", self.assert_ok(self.nsa("run", "in.toml", "--set",
                                                                      "run.context=[64, 65]", "--resume")).out)

    def test_a_limit_on_the_size_of_files(self):
        large = 16 << 20  # bytes: Open MPI itself needs some
        self.write("in.toml", SMALL.replace("warmup = 1", "warmup = 0") + "[output]\ntensors = true\n")
        settings = ("task.kind=prefill", "run.steps=1", 'run.modes=["total"]', "run.context=[64, 4096]", "run.batch=6",
                    "run.check=false")  # fmt: skip
        options = [word for setting in settings for word in ("--set", setting)]
        done = subprocess.run([BINARY, "run", "in.toml", *options], cwd=self.folder, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"},
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (large, large)))  # fmt: skip
        self.assertEqual(done.returncode, FILE, done.stderr)
        self.assertIn("File too large); make room", done.stderr)
        self.assertEqual(sorted(os.listdir(self.folder)), ["in.toml", "result.h5"])
        self.assertIn("INTERRUPTED", self.nsa("report", "result.h5").out)

    def test_a_text_that_cannot_be_written_leaves_the_earlier_one(self):
        self.assert_ok(self.nsa("run", "in.toml", "--output", "a.h5"))
        self.write("old", "earlier\n")
        os.symlink("old", self.path("link"))
        os.chmod(self.path("old"), 0o640)
        for words in (["diff", "a.h5", "a.h5", "--csv", "link"], ["gate", "a.h5", "--adr", "old"]):
            done = subprocess.run([BINARY, *words], cwd=self.folder, capture_output=True, text=True,
                                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99)))  # fmt: skip
            self.assertEqual(done.returncode, FILE, done.stderr)
            self.assertIn(f"cannot write {words[-1]} (File too large); choose another {words[-2]}", done.stderr)
            self.assertEqual(self.content()["old"], b"earlier\n")
            self.assertEqual(sorted(os.listdir(self.folder)), ["a.h5", "in.toml", "link", "old"])
        self.assert_ok(self.nsa("diff", "a.h5", "a.h5", "--csv", "link"))
        self.assertTrue(os.path.islink(self.path("link")))
        self.assertTrue(self.content()["old"].startswith(b"point,mode,"))
        self.assertEqual(os.stat(self.path("old")).st_mode & 0o777, 0o640)

    def test_closed_streams_end_up_in_no_file(self):
        done = subprocess.run(f"{BINARY} run in.toml >&- 2>&- <&-", shell=True, cwd=self.folder)
        self.assertEqual(done.returncode, 0)
        self.assertIn("RESULT: VALID", self.assert_ok(self.nsa("report", "result.h5")).out)


class Names(SlipsTest):
    def test_a_name_in_another_encoding(self):
        name = b"bad\xff.h5"
        done = subprocess.run([BINARY, "run", "in.toml", "--output", name, "--json", "told.json"], cwd=self.folder)
        self.assertEqual(done.returncode, 0)
        with open(self.path("told.json"), encoding="utf-8") as file:
            self.assertEqual(json.load(file)["file"], "bad\ufffd.h5")
        done = subprocess.run([BINARY, "run", "in.toml", "--output", name, "--resume"], cwd=self.folder)
        self.assertEqual(done.returncode, 0)

    def test_what_is_no_plain_file_is_not_waited_for(self):
        os.mkfifo(self.path("pipe"))
        os.mkfifo(self.path("pipe.csv"))
        for command in (["report", "pipe"], ["gate", "pipe"], ["gate", "pipe.csv"], ["diff", "pipe", "pipe"],
                        ["run", "in.toml", "--output", "pipe"], ["run", "in.toml", "--output", "pipe", "--resume"],
                        ["run", "in.toml", "--set", 'input.file="pipe"'], ["run", "in.toml", "--csv", "pipe"]):
            self.refuses(FILE, ["(not a plain file)"], *command)
        for command in (["report", "."], ["gate", "."], ["run", "in.toml", "--output", "."],
                        ["run", "in.toml", "--output", ".", "--resume"]):
            self.refuses(FILE, ["(it is a folder)"], *command)
        self.refuses(USAGE, ["cannot read /dev/zero (larger than 16 MiB)"], "run", "/dev/zero")


class Surroundings(SlipsTest):
    """The folder, the limits and the launch."""

    def run_in_shell(self, script, environment=None):
        """`nsa` in the script is the program."""
        done = subprocess.run(["bash", "-c", f'nsa() {{ "{BINARY}" "$@"; }}; {script}'], cwd=self.folder, text=True,
                              capture_output=True, env={**os.environ, **(environment or {})})
        return Finished(done.returncode, done.stdout, done.stderr)

    def test_nothing_of_the_system_is_called_a_bug(self):
        name = "x" * 260
        for script, part in (
            ("mkdir gone; cp in.toml gone; cd gone; exec 3<in.toml; rm -r ../gone; nsa run /dev/fd/3", "removed"),
            ("mkdir gone; cd gone; rmdir ../gone; nsa run ../in.toml --output r.h5", "cannot"),
            (f"nsa run in.toml --output {name}.h5", "File name too long"),
            (f"nsa run in.toml --csv {name}", "File name too long"),
            (f"nsa run {name}", "File name too long"),
            (f"nsa report {name}", "File name too long"),
            (f"nsa gate {name}.csv", "File name too long"),
            ("ln -s loop loop; nsa run in.toml --output loop", "Too many levels of symbolic links"),
        ):
            with self.subTest(script=script[:40]):
                done = self.run_in_shell(script)
                self.assertIn(done.code, (USAGE, FILE), done.err)
                self.assertIn(part, done.err)
                self.assertNotIn("report it", done.err)

    def test_a_file_that_is_cut_off_is_told_so(self):
        self.assert_ok(self.nsa("run", "in.toml", "--output", "a.h5"))
        os.truncate(self.path("a.h5"), 20000)
        done = self.nsa("report", "a.h5")
        self.assertEqual(done.code, FILE)
        self.assertIn("the file is cut off: copy it again", done.err)
        self.assertNotIn("LOCKING", done.err)

    def test_memory_that_the_user_has_limited(self):
        big = "--set run.context=10000000 --set run.fill=synthetic"
        done = self.run_in_shell(f"ulimit -v 2000000; nsa run in.toml {big}")
        self.assertEqual(done.code, DEVICE, done.out + done.err)
        self.assertIn("raise the limit of a process, 2048 MB (ulimit -v, ulimit -d)", done.err)

    def threads(self, **environment):
        done = self.run_in_shell("nsa info", environment)
        return re.search(r"^threads +(.*)$", done.out, re.MULTILINE).group(1)

    def test_threads_that_are_no_number_ask_for_nothing(self):
        for value in ("", "abc", "0", "-1", "4x", " "):
            self.assertEqual(self.threads(OMP_NUM_THREADS=value), "a rank's share of the cores it may use", value)
        for value, number in (("3", 3), ("2,4", 2), (" 5", 5)):
            self.assertEqual(self.threads(OMP_NUM_THREADS=value), f"{number} a rank (OMP_NUM_THREADS)")
        done = self.run_in_shell("nsa run in.toml", {"OMP_NUM_THREADS": "abc"})
        self.assertIn("note: OMP_NUM_THREADS=abc is no number of threads", self.assert_ok(done).out)

    def test_threads_that_cannot_be_started(self):
        done = self.run_in_shell("ulimit -v 1500000; nsa run in.toml", {"OMP_NUM_THREADS": "300"})
        self.assertEqual(done.code, DEVICE, done.out + done.err)
        self.assertIn("cannot start 300 threads (Resource temporarily unavailable)", done.err)

    def test_a_limit_of_threads_counts(self):
        done = self.run_in_shell("nsa info", {"OMP_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "3"})
        self.assertIn(", 3 threads,", done.out)

    def test_ranks_that_do_not_know_of_each_other(self):
        for name in ("SLURM_STEP_NUM_TASKS", "PMI_SIZE"):
            done = self.run_in_shell("nsa run in.toml", {name: "4"})
            self.assertEqual(done.code, USAGE, done.out + done.err)
            self.assertIn(f"the launcher has started 4 processes and MPI sees one ({name}=4", done.err)
        self.assertEqual(os.listdir(self.folder), ["in.toml"])
        self.assert_ok(self.run_in_shell("nsa run in.toml", {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}))

    def test_a_process_without_a_launcher_leaves_nothing(self):
        os.mkdir(self.path("temporary"))
        done = self.run_in_shell("nsa run in.toml; nsa run in.toml --set model.d_k=15",
                                 {"TMPDIR": self.path("temporary")})
        self.assertIn("RESULT: VALID", done.out)
        self.assertIn("model.d_k", done.err)
        self.assertEqual(os.listdir(self.path("temporary")), [])

    def test_ranks_that_are_started_with_different_words(self):
        self.write("other.toml", SMALL)
        start = f"-n 1 {BINARY} run"
        done = self.run_in_shell(f"{MPIEXEC} --oversubscribe --allow-run-as-root {start} in.toml : {start} other.toml")
        self.assertEqual(done.code, USAGE, done.out + done.err)
        self.assertIn("nsa: error: rank 1 was started with run other.toml, and rank 0 with run in.toml", done.err)
        self.assertEqual(sorted(os.listdir(self.folder)), ["in.toml", "other.toml"])

    def test_another_program_that_ends_with_1_is_no_bug(self):
        done = self.run_in_shell(f"nsa run in.toml --against {BINARY} --launcher false")
        self.assertEqual(done.code, USAGE, done.out + done.err)
        self.assertIn("ended with code 1 (its message is above)", done.err)
        self.assertNotIn("report it", done.err)

    def test_files_that_cannot_be_opened(self):
        done = self.run_in_shell("ulimit -n 4; nsa run in.toml")  # nsa itself needs a pipe before MPI starts
        self.assertEqual(done.code, DEVICE, done.out + done.err)
        self.assertIn("(a pipe: Too many open files); raise the limits of the process (ulimit -u, -n, -v)", done.err)

    def test_cores_that_mpirun_keeps(self):
        if len(os.sched_getaffinity(0)) < 2:
            self.skipTest("one core")
        launch = f"{MPIEXEC} -n 1 --allow-run-as-root --bind-to"
        bound = self.run_in_shell(f"{launch} core {BINARY} run in.toml --output a.h5")
        if bound.code != 0:
            self.skipTest("this mpirun knows no --bind-to")
        self.assertRegex(bound.out, r"note: mpirun has bound the ranks of \S+ to 1 of its \d+ cores; --bind-to none")
        free = self.assert_ok(self.run_in_shell(f"{launch} none {BINARY} run in.toml --output b.h5"))
        self.assertNotIn("has bound", free.out)


class Input(SlipsTest):
    def test_what_is_written_otherwise(self):
        self.assert_ok(self.nsa("run", "in.toml", "--dry-run", "--set", "run.context = [64]"))
        self.refuses(USAGE, ["in.toml:14:3: [[nsa]] is a list of sections; write [nsa], once"],
                     *self.with_text("[[nsa]]\nw = 32\n"))
        self.refuses(USAGE, ["kernels.rows = 0 (all positions) leaves none; give a number of rows"],
                     *self.with_text(""), "--set", "task.kind=kernels", "--set", "kernels.rows=0")
        self.refuses(USAGE, ["the needle at depth 0.25 of 4096 tokens cannot be found (nsa.n_sel = 3 leaves no block"],
                     *self.with_text(""), "--set", "task.kind=needle", "--set", "nsa.n_sel=3", "--set",
                     "run.context=4096")

    def with_text(self, more):
        self.write("in.toml", SMALL + more)
        return "run", "in.toml"

    def test_empty_names(self):
        for option in ("--output", "--csv", "--json", "--max-time"):
            self.refuses(USAGE, [f"{option}: is empty"], "run", "in.toml", option, "")
        self.refuses(USAGE, ["--adr: is empty"], "gate", "in.toml", "--adr", "")

        for command in (["report", ""], ["gate", ""], ["diff", "", ""], ["diff", "in.toml", "in.toml", "--csv", ""],
                        ["run", "in.toml", "--against", ""]):
            self.refuses(USAGE, [": is empty; see nsa"], *command)
        self.assertIn("complete -o", self.assert_ok(self.nsa("--completion=bash")).out)
        for option in ("--output", "--csv", "--json"):
            self.refuses(USAGE, [f"{option}: - is no name of a file; write ./-"], "run", "in.toml", option, "-")

    def test_numbers_of_options(self):
        self.assert_ok(self.nsa("run", "in.toml", "--output", "a.h5"))
        for value in ("064", "0x40", "nan", "inf", "1e400", "1_000", "64 ", "6 4"):
            for command in (["run", "in.toml", "--dry-run", "--ranks"], ["gate", "a.h5", "--context"],
                            ["run", "in.toml", "--against", "nsa", "--pairs"],
                            ["run", "in.toml", "--startup-deadline"]):  # fmt: skip
                self.refuses(USAGE, [f"{command[-1]}: {value} is no decimal number"], *command, value)
        for value in ("-5%", "-0.5", "nan", "nan%", "0x5", "05%", "%", "5 %"):
            self.refuses(USAGE, [f"--fail-above: {value} is no share; write it like 5%"], "diff", "a.h5", "a.h5",
                         f"--fail-above={value}")
        for value in ("5%", "0.05", "+5%", ".5", "0"):
            self.assert_ok(self.nsa("diff", "a.h5", "a.h5", "--fail-above", value))

    def test_a_misspelt_option_comes_before_a_missing_argument(self):
        self.refuses(USAGE, ["not expected: --outptu (did you mean --output?); see nsa run"], "run", "--outptu=x.h5")
        self.refuses(USAGE, ["INPUT is required; see nsa run"], "run", "--dry-run")

    def test_contexts_of_the_gate(self):
        self.assert_ok(self.nsa("run", "in.toml", "--output", "a.h5"))
        for value in ("", "-1", "0", "100000000000000000000", "64,x"):
            self.refuses(USAGE, ["--context"], "gate", "a.h5", f"--context={value}")

    def test_a_trace_whose_numbers_would_move(self):
        trace = "run", "in.toml", "--set", "batch.distribution=file", "--set", 'batch.file="t.csv"'
        self.write("in.toml", SMALL.replace("context = 64\n", ""))
        self.write("t.csv", "prompt\n1,024\n")
        self.refuses(FILE, ["t.csv:2: 2 cells in a table of 1 columns"], *trace)
        self.write("t.csv", '\ufefftime,prompt\r\n"Nov 16, 2023",70\r\n')
        self.assertIn("lengths 70 to 70", self.assert_ok(self.nsa(*trace, "--dry-run")).out)

    def test_bytes_of_the_copy(self):
        self.write("in.toml", SMALL.replace("copy_bytes = 1048576\n", ""))
        for option, said in (("auto", "268 MB"), (65536, "131 kB")):
            value = f'run.copy_bytes="{option}"' if option == "auto" else f"run.copy_bytes={option}"
            done = self.assert_ok(self.nsa("run", "in.toml", "--dry-run", "--set", value))
            self.assertIn(f"the copy rate is measured with {said} a rank", done.out)
        self.refuses(USAGE, ["run.copy_bytes = 1024 is out of range"], "run", "in.toml", "--set", "run.copy_bytes=1024")

    def test_contexts_that_no_machine_holds(self):
        for settings in (["run.context=1073741824"], ["task.kind=prefill", "run.context=1", "run.prefix=1073741823"],
                         ["task.kind=prefill", "run.context=1073741824", "run.prefill_chunk=1"]):  # fmt: skip
            options = [word for setting in settings for word in ("--set", setting)]
            self.refuses(USAGE, ["positions takes too many tiles", "; lower"], "run", "in.toml", "--dry-run", *options)

    def test_durations(self):
        for value in ("0x10", "inf", "nan", "1e400", "-5", "1:60", "1-24", "1:2:3:4", "10 m", "1d", "-", ":"):
            self.refuses(USAGE, [f"--max-time {value} (not a duration)"], "run", "in.toml", f"--max-time={value}")
        for value in ("1-00:00:00", "30:00", "1-12", "0-1:30", "100:00:00", "1.5h", "90"):
            self.assert_ok(self.nsa("run", "in.toml", "--max-time", value))
            os.remove(self.path("result.h5"))

    def test_variables_that_do_nothing(self):
        for name, value, part in (("NSA_ROUTE_FOO", "sdpa", "did you mean NSA_ROUTE_"),
                                  ("NSA_ROUTES_SEL", "sdpa", "did you mean NSA_ROUTE_SEL?"),
                                  ("NSA_EXCHANGE", "foo", "NSA_EXCHANGE=foo in the environment (it is nccl)"),
                                  ("NSA_SHARE_GPU", "yes", "(it is 0 or 1)"), ("NSA_FORCE", "2", "(it is 0 or 1)")):
            with self.subTest(name=name), unittest.mock.patch.dict(os.environ, {name: value}):
                self.refuses(USAGE, [part], "run", "in.toml")


if __name__ == "__main__":
    unittest.main(verbosity=2)
