"""A Slurm for one test: own folder, own ports, own MUNGE socket, the caller's account. One node on the loopback device,
or one a host of ../hosts/hosts.py.

Nothing is taken from or left on the machine: a Slurm or MUNGE that runs here already is neither used nor disturbed.
A node claims CPUs and GPUs that it may not have; nothing binds to them. Python 3, standard library only.
"""

import ctypes
import getpass
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time

CPUS, GPUS = 4, 4
START, STOP = 30, 15  # seconds
NODE_TIMEOUT = 20  # seconds without an answer after which a node counts as lost; Slurm's default is 300
MARK = "NSA_PRIVATE_SLURM"  # environment variable: the folder; every process of this Slurm and its jobs has it

SLURM_CONF = """ClusterName=nsatest
SlurmctldHost={control_host}({control_address})
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdTimeout={node_timeout}
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
FirstJobId={first_job}
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=test Nodes=ALL Default=YES State=UP
"""


def die_with_parent():
    """Daemons of a test that is killed must not stay behind."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class PrivateSlurm:
    """`packages`: what ../unpack.sh left. `cluster`: hosts.Hosts; None: this machine. slurmctld runs on the first host.
    `start` raises RuntimeError with the daemons' last words."""

    def __init__(self, packages, cluster=None):
        parent = str(cluster.folder) if cluster else "/tmp"
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="nsa-slurm-", dir=parent))  # short: sockets live in it
        for folder in (self.folder, self.folder.parent) if cluster else (self.folder,):
            folder.chmod(0o711)  # MUNGE wants its socket to be reachable
        if cluster:
            self.addresses = {name: cluster.address(name) for name in cluster.names}
            self.on = cluster.on
        else:
            self.addresses = {socket.gethostname().split(".")[0]: "127.0.0.1"}
            self.on = lambda name, folder: []
        self.control_host = next(iter(self.addresses))
        self.daemons = []
        roots = [pathlib.Path(packages), pathlib.Path("/")]
        libraries = [library for root in roots for library in root.glob("usr/lib/*-linux-gnu")]
        plugins = [library / "slurm-wlm" for library in libraries if (library / "slurm-wlm").is_dir()]
        self.plugins = ":".join(map(str, plugins))
        self.programs = [str(root / folder) for root in roots for folder in ("usr/bin", "usr/sbin")]
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment.update(
            {
                MARK: str(self.folder),
                "SLURM_CONF": str(self.folder / "slurm.conf"),
                "PATH": os.pathsep.join([self.programs[0], self.environment["PATH"]]),
                "LD_LIBRARY_PATH": os.pathsep.join(
                    [str(p) for p in plugins + [x for x in libraries if str(x).startswith(str(packages))]]
                    + [p for p in [self.environment.get("LD_LIBRARY_PATH")] if p]
                ),
            }
        )

    def program(self, name):
        """Debian installs slurmd as slurmd-wlm; the daemons behave by the name that they are started under."""
        for candidate in (os.path.join(folder, name + end) for folder in self.programs for end in ("", "-wlm")):
            if candidate.endswith("-wlm") and os.access(candidate, os.X_OK):
                link = self.folder / name
                if not link.exists():
                    link.symlink_to(candidate)
                return str(link)
            if os.access(candidate, os.X_OK):
                return candidate
        raise RuntimeError(f"no {name} among the packages")

    def daemon(self, host, *command):
        with open(self.folder / f"{pathlib.Path(command[0]).name}.{host}.out", "w") as out:
            process = subprocess.Popen(
                [*self.on(host, self.folder), *command], cwd=self.folder, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)  # fmt: skip
        self.daemons.append(process)

    def until(self, done, what, seconds):
        end = time.monotonic() + seconds
        while not done():
            ended = [" ".join(d.args) for d in self.daemons if d.poll() is not None]
            if ended or time.monotonic() > end:
                reason = f"{ended[0]} ended" if ended else f"not in {seconds} s"
                raise RuntimeError(f"{what}: {reason}" + self.logs())
            time.sleep(0.1)

    def logs(self):
        state = "".join(self.run(*words, check=False) for words in (("sinfo", "-N"), ("scontrol", "show", "job")))
        names = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        ends = ("\n".join(name.read_text().splitlines()[-12:]) for name in names)
        return state + "".join(f"\n--- {name.name}\n{end}" for name, end in zip(names, ends))

    def start(self):
        for name in ("state", "pmix"):
            (self.folder / name).mkdir()
        for host in self.addresses:
            if enter := self.on(host, self.folder):  # a folder of its own on each host
                subprocess.run([*enter, "mount", "-t", "tmpfs", "tmpfs", self.folder / "pmix"], check=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        ports = free_ports(2)
        # Open MPI names its shared memory by the job's number: another Slurm of this machine must not have the same.
        first_job = random.randrange(10**6, 6 * 10**7)
        gpus = f" Gres=gpu:{GPUS}" if len(self.addresses) == 1 else ""  # Slurm 22.05 loses count of them at a requeue
        nodes = "\n".join(f"NodeName={name} NodeAddr={address} CPUs={CPUS}{gpus} State=UNKNOWN"
                          for name, address in self.addresses.items())  # fmt: skip
        conf = SLURM_CONF.format(
            first_job=first_job, control_host=self.control_host, control_address=self.addresses[self.control_host],
            nodes=nodes, user=getpass.getuser(), folder=self.folder, plugins=self.plugins, node_timeout=NODE_TIMEOUT,
            ctld_port=ports[0], slurmd_port=ports[1])  # fmt: skip
        (self.folder / "slurm.conf").write_text(conf)
        for gpu in range(GPUS):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # v2 wants systemd; nothing here uses it
        # Otherwise in /tmp under the job's number, where another Slurm of this machine may have it.
        (self.folder / "mpi.conf").write_text(f"PMIxCliTmpDirBase={self.folder}/pmix\n")
        munge_files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid",
                       "log-file": "munge.log", "seed-file": "munge.seed"}  # fmt: skip
        self.daemon(self.control_host, self.program("munged"), "--foreground", "--force", "--num-threads=2",
                    *(f"--{option}={self.folder / name}" for option, name in munge_files.items()))  # fmt: skip
        self.until(lambda: (self.folder / "munge.socket").exists(), "munged", START)
        self.daemon(self.control_host, self.program("slurmctld"), "-D", "-i")
        for host in self.addresses:
            self.daemon(host, self.program("slurmd"), "-D", "-N", host, "-d", self.program("slurmstepd"))
        self.until(self.all_idle, "idle nodes", START)

    def all_idle(self):
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle"] * len(self.addresses)

    def run(self, program, *arguments, check=True, cwd=None, **environment):
        folder = cwd or self.folder
        done = subprocess.run(
            [*self.on(self.control_host, folder), self.program(program), *arguments], cwd=folder,
            env={**self.environment, **environment}, capture_output=True, text=True, timeout=60)  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr}{self.logs()}")
        return done.stdout

    def processes(self):
        """Every process of this Slurm and of its jobs, this one excepted: {pid: command line}."""
        mark = f"{MARK}={self.folder}".encode()
        found = {}
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # ended meanwhile, or somebody else's
                continue
        return found

    def stop(self):
        """Ends the jobs and the daemons. Returns what did not end by itself and had to be killed: {pid: command}."""
        if len(self.daemons) == 2 + len(self.addresses):
            self.run("scancel", "--full", "-u", getpass.getuser(), check=False)
        for daemon in reversed(self.daemons):  # slurmd first: it waits for its jobs' ends
            daemon.terminate()
            try:
                daemon.wait(STOP)
            except subprocess.TimeoutExpired:
                pass
        end = time.monotonic() + STOP
        while self.processes() and time.monotonic() < end:
            time.sleep(0.1)
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for daemon in self.daemons:
            daemon.wait()
        self.daemons = []
        return left

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)
