"""Submits cases of a sweep to Slurm, one job array per rank count, each with the nodes that it needs."""

import shlex
import subprocess
import time

from .cases import UsageError
from .states import RUNNABLE, sha256_of


def submit(args, cases, states):
    """Submits what is neither complete nor in the queue. Returns the exit code."""
    wanted = RUNNABLE + (("failed",) if args.retry_failed else ())
    now = [states.of(case).state for case in cases]
    indices = [i for i, state in enumerate(now) if state in wanted]
    for ranks in sorted({cases[i].ranks for i in indices}):
        of_ranks = [i for i in indices if cases[i].ranks == ranks]
        nodes = -(-ranks // args.ranks_per_node)
        if ranks % nodes:
            raise UsageError("%d ranks do not fill %d nodes evenly; choose another --ranks-per-node" % (ranks, nodes))
        command = ["sbatch", "--parsable", "--array=" + ",".join(map(str, of_ranks)), "--nodes=%d" % nodes,
                   "--ntasks-per-node=%d" % (ranks // nodes)]
        command += ["--dependency=afterany:" + args.after] if args.after else []
        command += args.sbatch + [args.submit, args.list, args.results]
        job = sbatch(command)
        if job is None:
            return 1
        print("%s: %s" % (job, " ".join(map(shlex.quote, command))), flush=True)
        for i in of_ranks:
            task = "%s_%d" % (job, i)
            if states.record(cases[i]).get("job") != task:  # else it runs already
                states.write(cases[i], state="queued", job=task, submitted=time.time(),
                             input_sha256=sha256_of(cases[i].input))
    if not indices:
        failed = now.count("failed")
        print("nothing is left to submit" + ("; %d failed: --retry-failed" % failed if failed else ""))
    return 0


def sbatch(command):
    """The number of the job; None if sbatch said why not."""
    try:
        told = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True)
    except OSError as error:
        raise UsageError("cannot start sbatch (%s); run this where Slurm is" % error.strerror) from None
    return told.stdout.strip().split(";")[0] if told.returncode == 0 else None
