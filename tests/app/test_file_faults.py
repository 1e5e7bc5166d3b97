"""Every fault that the writing of a result file can meet, and a kill at every one of its system calls: exit code 6 on
all ranks and one message, or a dead run; the finished points readable; and --resume completes the file to what it would
have been. file_faults.c makes the system calls fail. Needs h5py."""

import fcntl
import os
import shutil
import subprocess
import time
import unittest

from harness import BINARY, HANG, MPIEXEC, SMALL, AppTest
from same_result import differences

FILE = 6
EIO, ENOENT, EDQUOT, ENOSPC, ENOLCK = 5, 2, 122, 28, 37
TWO_POINTS = SMALL.replace("context = 64", "context = [64, 96]")


class FileFaults(AppTest):
    def setUp(self):
        super().setUp()
        self.write("in.toml", TWO_POINTS)

    def path(self, name):
        return os.path.join(self.folder, name)

    def start(self, *arguments, fault="", log="", ranks=0, environment=None):
        command = [BINARY, "run", "in.toml", *arguments]
        if ranks:
            command = [MPIEXEC, "-n", str(ranks), "--oversubscribe", "--allow-run-as-root", *command]
        faults = {"LD_PRELOAD": os.environ["NSA_FILE_FAULTS"], "FILE_FAULT": fault, "FILE_FAULT_LOG": log}
        run = subprocess.Popen(command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1", **faults, **(environment or {})})
        self.addCleanup(run.kill)
        return run

    def end(self, run):
        out, err = run.communicate(timeout=HANG)
        return run.returncode, out, err

    def wait_for(self, log, line):
        """Until the process is at that system call."""
        end = time.monotonic() + HANG
        while True:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.01)
            if os.path.exists(log):
                with open(log) as file:
                    if line in file.read().splitlines():
                        return

    def go_on(self, log):
        open(log + ".go", "w").close()

    def reference(self):
        """An undisturbed run; how often it makes each system call."""
        self.end(self.start(log=self.path("log")))
        calls = {}
        with open(self.path("log")) as file:
            for line in file:
                name, number = line.split()
                calls[name] = int(number)
        os.remove(self.path("log"))
        os.rename(self.path("result.h5"), self.path("reference.h5"))
        self.assertEqual(set(calls), {"open", "flock", "pwrite", "copy", "fsync", "link", "rename", "fsync_folder"})
        return calls

    def assert_refused(self, ended, part="nsa: error: cannot "):
        code, out, err = ended
        self.assertEqual(code, FILE, out + err)
        self.assertEqual(err.count("nsa: "), 1, err)
        self.assertIn(part, err)
        self.assertNotIn("RESULT", out)

    def assert_resumes(self, ranks=0):
        """Whatever is there, the same command with --resume makes the undisturbed file of it."""
        self.assert_ok(self.nsa("run", "in.toml", "--resume", ranks=ranks))
        self.assertEqual(differences(self.path("reference.h5"), self.path("result.h5")), [])
        self.assertEqual(sorted(os.listdir(self.folder)), ["in.toml", "reference.h5", "result.h5"])
        os.remove(self.path("result.h5"))

    # Every system call. Of the writes, which are many, one in `stride`.

    def sites(self, calls, stride):
        for name, count in calls.items():
            for call in range(1, count + 1):
                if name != "pwrite" or call % stride == 1 or call == count:
                    for file in os.listdir(self.folder):  # of a case that failed
                        if file.startswith("result.h5"):
                            os.remove(self.path(file))
                    yield name, call

    def test_every_call_may_fail(self):
        for name, call in self.sites(self.reference(), 14):
            if name == "link":  # a file system without links: rename does it
                continue
            with self.subTest(function=name, call=call):
                error = {"flock": ENOLCK, "fsync": EIO, "open": EDQUOT}.get(name, ENOSPC)
                self.assert_refused(self.end(self.start(fault=f"{name}:{call}:{error}")))
                self.assertEqual([file for file in os.listdir(self.folder) if file.endswith(".tmp")], [])
                self.assert_resumes()

    def test_a_file_system_without_links(self):
        self.reference()
        code, out, err = self.end(self.start(fault=f"link:1:{EDQUOT}"))
        self.assertEqual(code, 0, out + err)
        self.assert_resumes()

    def test_killed_at_every_call(self):
        for name, call in self.sites(self.reference(), 25):
            for moment in ("kill", "killed-after") if name != "pwrite" else ("kill",):
                with self.subTest(function=name, call=call, moment=moment):
                    code, out, err = self.end(self.start(fault=f"{name}:{call}:{moment}"))
                    self.assertEqual(code, -9, out + err)
                    self.assert_resumes()

    def test_on_two_ranks_nobody_waits(self):
        self.assert_ok(self.nsa("run", "in.toml", ranks=2))
        os.rename(self.path("result.h5"), self.path("reference.h5"))
        for fault in (f"fsync:1:{EIO}", f"pwrite:40:{ENOSPC}", f"rename:2:{EDQUOT}"):
            with self.subTest(fault=fault):
                code, out, err = self.end(self.start(fault=fault, ranks=2))
                self.assertEqual(code, FILE, out + err)
                self.assertEqual(err.count("nsa: "), 1, err)
                self.assert_resumes(ranks=2)
        for fault in ("pwrite:100:kill", "rename:1:kill", "rename:1:killed-after", "link:1:killed-after"):
            with self.subTest(fault=fault):
                code, out, err = self.end(self.start(fault=fault, ranks=2))
                self.assertNotEqual(code, 0)
                self.assert_resumes(ranks=2)

    # Real faults

    def mounted(self):
        """A file system of 1 MB, in which the run writes."""
        os.mkdir(self.path("small"))
        if os.system(f"mount -t tmpfs -o size=1m none {self.path('small')} 2>/dev/null") != 0:
            self.skipTest("mounting a small file system needs root and the right to mount")
        self.addCleanup(os.system, f"umount {self.path('small')}")
        return self.path("small")

    def disturbed(self, change, part, mend, output="result.h5"):
        """`change` happens after the first point was sealed; the run fails, saying `part`; `mend`; --resume."""
        self.assert_ok(self.nsa("run", "in.toml", "--output", "reference.h5"))
        log = self.path("log")
        run = self.start("--output", output, fault="fsync_folder:1:wait", log=log)
        self.wait_for(log, "fsync_folder 1")
        change()
        self.go_on(log)
        self.assert_refused(self.end(run), part)
        mend()
        self.assertEqual(self.nsa("diff", output, output).code, 0)  # what was finished can be read
        self.assert_ok(self.nsa("run", "in.toml", "--resume", "--output", output))
        ignored = {"config", "points/0000.output.file", "points/0001.output.file", "/.config"}
        found = [line for line in differences(self.path("reference.h5"), self.path(output))
                 if line.split(":")[0] not in ignored]
        self.assertEqual(found, [])

    def test_the_disk_is_full(self):
        folder = self.mounted()
        filler = os.path.join(folder, "filler")

        def fill():
            with open(filler, "wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 4096):
                        pass
                except OSError as error:
                    self.assertEqual(error.errno, ENOSPC)

        self.disturbed(fill, "No space left on device", lambda: os.remove(filler), "small/result.h5")

    def test_the_file_system_becomes_read_only(self):
        folder = self.mounted()

        def remount(how):
            return lambda: self.assertEqual(os.system(f"mount -o remount,{how} {folder}"), 0)

        self.disturbed(remount("ro"), "Read-only file system", remount("rw"), "small/result.h5")

    def test_the_folder_is_read_only(self):
        folder = self.mounted()
        os.system(f"mount -o remount,ro {folder}")
        done = self.nsa("run", "in.toml", "--output", "small/result.h5", ranks=2)
        self.assertEqual(done.code, FILE, done.out + done.err)
        self.assertIn("nsa: error: cannot write small/result.h5 (small: Read-only file system)", done.err)

    def test_the_file_vanishes(self):
        def away():
            os.rename(self.path("result.h5"), self.path("away.h5"))

        self.disturbed(away, "cannot add a point to result.h5 (No such file or directory); put it back",
                       lambda: os.rename(self.path("away.h5"), self.path("result.h5")))

    def test_another_file_takes_its_place(self):
        def replace():
            os.rename(self.path("result.h5"), self.path("away.h5"))
            shutil.copy(self.path("reference.h5"), self.path("result.h5"))

        def back():
            self.assertEqual(differences(self.path("reference.h5"), self.path("result.h5")), [])  # left alone
            os.rename(self.path("away.h5"), self.path("result.h5"))

        self.disturbed(replace, "another program has written or replaced it", back)

    # Two runs and one file

    def test_two_runs_make_the_same_file(self):
        log = self.path("log")
        late = self.start(fault="link:1:wait", log=log)
        self.wait_for(log, "link 1")
        self.assert_ok(self.nsa("run", "in.toml"))
        shutil.copy(self.path("result.h5"), self.path("reference.h5"))
        self.go_on(log)
        self.assert_refused(self.end(late), "result.h5 exists (another program has made it since this run began)")
        self.assertEqual(differences(self.path("reference.h5"), self.path("result.h5")), [])

    def test_two_runs_go_on_with_the_same_file(self):
        self.reference()
        self.end(self.start(fault="rename:1:kill"))
        log = self.path("log")
        late = self.start("--resume", fault="fsync:1:wait", log=log)
        self.wait_for(log, "fsync 1")
        self.assert_ok(self.nsa("run", "in.toml", "--resume"))
        self.go_on(log)
        self.assert_refused(self.end(late))
        os.remove(log)
        os.remove(log + ".go")
        self.assert_resumes()  # it is complete, and stays so

    # Locks

    def test_a_file_system_without_locks(self):
        fault = f"flock:{{}}:{ENOLCK}"
        self.assert_refused(self.end(self.start(fault=fault.format(2))),
                            "set HDF5_USE_FILE_LOCKING=FALSE where the file system has no locks")
        self.assertEqual(os.listdir(self.folder), ["in.toml"])
        code, out, err = self.end(self.start(fault=fault.format(1), environment={"HDF5_USE_FILE_LOCKING": "FALSE"}))
        self.assertEqual(code, 0, out + err)

    def test_another_program_has_the_file_locked(self):
        self.reference()
        self.end(self.start(fault="rename:1:kill"))
        with open(self.path("result.h5"), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            done = self.nsa("run", "in.toml", "--resume", ranks=2)
            self.assertEqual(done.code, FILE, done.out + done.err)
            self.assertIn("close the program that has it open, or set HDF5_USE_FILE_LOCKING=FALSE", done.err)
            self.assertEqual(done.err.count("nsa: error: "), 1, done.err)
        self.assert_resumes()


if __name__ == "__main__":
    unittest.main(verbosity=2)
