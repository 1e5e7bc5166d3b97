"""Hosts made of namespaces: each has its own name, network address, loopback device, /etc/hosts and /dev/shm; all of
them see the same files and processes, as the nodes of a cluster see a shared file system.

`main` runs a test within PID, network and mount namespaces of its own. The kernel ends every process in there with the
test, however it ends, and no interface or mount is left. Needs root. Python 3, standard library only.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

INSIDE = "NSA_TEST_INSIDE"  # environment variable: the process runs in the namespaces of `main`
SUBNET = "10.77"  # of addresses that exist in these namespaces only


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    """`count` hosts n1, n2, ... on one switch. Several networks of hosts do not reach one another."""

    networks = 0

    def __init__(self, count):
        Hosts.networks += 1
        self.network = Hosts.networks
        self.names = [f"n{i + 1}" for i in range(count)]
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="nsa-hosts-"))
        self.holders = {}
        self.without_files = []
        for part in (0, 1):  # the second one is for partitions
            run("ip", "link", "add", self.switch(part), "type", "bridge")
            run("ip", "link", "set", self.switch(part), "up")
        addresses = "".join(f"{self.address(name)} {name}\n" for name in self.names)
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + addresses)
        for name in self.names:
            self.add(name)
        self.agent = self.folder / "agent"  # as ssh: agent [options] HOST COMMAND...
        self.agent.write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift\n'
                              f'exec nsenter -n -u -m -t "$(cat {self.folder}/$host.pid)" -- sh -c "$*"\n')  # fmt: skip
        self.agent.chmod(0o755)

    def switch(self, part):
        return f"sw{self.network}.{part}"

    def port(self, name):
        return f"p{self.network}.{name}"

    def address(self, name):
        return f"{SUBNET}.{self.network}.{self.names.index(name) + 1}"

    def add(self, name):
        setup = (f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm && "
                 f"ip link set lo up && echo up && exec sleep infinity")  # fmt: skip
        holder = subprocess.Popen(["unshare", "--net", "--uts", "--mount", "sh", "-c", setup], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)  # fmt: skip
        if holder.stdout.readline() != "up\n":
            raise RuntimeError(f"no host {name}: {holder.stderr.read().strip()}")
        self.holders[name] = holder
        (self.folder / f"{name}.pid").write_text(str(holder.pid))
        run("ip", "link", "add", self.port(name), "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        run("ip", "link", "set", self.port(name), "master", self.switch(0), "up")
        run(*self.on(name), "ip", "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        run(*self.on(name), "ip", "link", "set", "eth0", "up")

    def on(self, name, folder="/"):
        """The words before a command that runs on this host in this folder."""
        return ["nsenter", "-n", "-u", "-m", "-t", str(self.holders[name].pid), f"--wd={folder}", "--"]

    def cut(self, *names):
        """Nothing reaches these hosts and nothing leaves them, files included; nobody is told."""
        for name in names:
            run("ip", "link", "set", self.port(name), "nomaster")
            run(*self.on(name), "mount", "-t", "tmpfs", "tmpfs", str(self.folder))
        self.without_files += names

    def separate(self, *names):
        """These hosts reach each other but not the rest."""
        for name in names:
            run("ip", "link", "set", self.port(name), "master", self.switch(1))

    def heal(self):
        for name in self.names:
            run("ip", "link", "set", self.port(name), "master", self.switch(0))
        for name in self.without_files:
            run(*self.on(name), "umount", str(self.folder))
        self.without_files = []

    def processes(self):
        """What runs on these hosts: {pid: (host, command line)}."""
        networks = {os.readlink(f"/proc/{holder.pid}/ns/net"): name for name, holder in self.holders.items()}
        holders = {holder.pid for holder in self.holders.values()}
        found = {}
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in holders:
                continue
            try:
                host = networks.get(os.readlink(entry / "ns" / "net"))
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # ended meanwhile
                continue
            if host and command:
                found[int(entry.name)] = (host, command)
        return found

    def remove(self):
        for holder in self.holders.values():
            holder.kill()
            holder.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)


def reason_to_skip():
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mpirun") if not shutil.which(tool)]
    if missing:
        return f"no {', '.join(missing)} here (packages iproute2, util-linux, openmpi-bin)"
    done = subprocess.run(["unshare", "--fork", "--pid", "--net", "--mount", "--mount-proc", "ip", "link", "add", "sw",
                           "type", "bridge"], capture_output=True, text=True)  # fmt: skip
    return f"no namespaces or bridges here ({done.stderr.strip()})" if done.returncode else ""


def main(run_tests):
    """Runs `run_tests` in namespaces of its own. Returns its exit code, or 77 where there are none."""
    if os.environ.get(INSIDE):
        run("ip", "link", "set", "lo", "up")
        return run_tests()
    reason = reason_to_skip()
    if reason:
        print(f"SKIPPED: {reason}")
        return 77
    command = ["unshare", "--fork", "--pid", "--kill-child", "--net", "--mount", "--mount-proc", sys.executable, "-B",
               *sys.argv]  # fmt: skip
    return subprocess.run(command, env=dict(os.environ, **{INSIDE: "1"})).returncode
