"""Reads result files (docs/SCHEMA.md) into points.

A point keeps the samples of the slowest rank and the medians of every rank. Raw samples stay in the files, so hundreds
of files of hundreds of ranks fit into memory.
"""

import dataclasses
import functools
import os
import pathlib
import stat

import h5py
import numpy as np

from ..errors import AnalysisError, FileError
from .hdf5 import attributes_of, load_labels, load_numbers, members_of, to_python
from .parallel import parallel
from .statistics import STATISTICS, median_and_interval, summaries, summarise

SCHEMA_MAJOR = 1
LARGE = 8 << 20  # bytes: what is larger is read by several processes
STAGES = (
    "project",
    "append",
    "compress",
    "attend_cmp",
    "rank",
    "attend_sel",
    "attend_win",
    "combine",
    "output",
    "comm",
    "step",
)
COMPUTE_STAGES = STAGES[:-2]  # stages without the exchanges and the whole step
BRANCHES = ("cmp", "sel", "win")


@dataclasses.dataclass(frozen=True)
class Run:
    """One file: attributes of `/` and columns of `/system`."""

    path: str
    attributes: dict
    system: dict  # name -> list over ranks

    @property
    def device(self):
        """Name of the GPU, or of the processor on the host backend. Names are joined where ranks differ."""
        names = self.system.get("gpu" if self.attributes.get("backend") == "cuda" else "cpu", [])
        return " + ".join(sorted(set(filter(None, names)))) or "unknown device"

    @property
    def oversubscribed(self):
        """(ranks, threads, cores) of the first rank whose cores run more threads than there are cores, else None.

        Such ranks share cores, so their times do not count for scaling. Files before schema 1.2 have no such columns.
        """
        if self.attributes.get("backend") != "host":
            return None
        columns = (self.system.get(name, []) for name in ("sharers", "threads", "cores"))
        return next(((r, t, c) for r, t, c in zip(*columns) if r * t > c), None)


@dataclasses.dataclass(frozen=True)
class ModeTimes:
    """Times of one mode of a point in seconds, without warm-up. NaN: the stage was not timed."""

    slowest: np.ndarray  # [stage, rep]: maximum over ranks
    rank_median: np.ndarray  # [stage, rank]
    rank_low: np.ndarray  # [stage, rank]: low end of the median's interval
    compute_median: np.ndarray  # [rank]: median of the sum of COMPUTE_STAGES
    statistics: np.ndarray  # [statistic of STATISTICS, stage]: of the slowest rank

    @functools.cached_property
    def summary(self):
        """Statistics of the slowest rank by stage: {name of STATISTICS: [stage]}."""
        table = dict(zip(STATISTICS, self.statistics))
        return table | {"n": table["n"].astype(int)}


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a result file."""

    run: Run
    index: int
    parameters: dict  # every attribute of the point, by its name in the file
    ranks: int
    modes: dict  # name -> ModeTimes
    reads: dict  # "counted", "expected" -> [branch]: tokens read at the last step, summed over ranks
    reads_nsa_vibe: float
    bytes: np.ndarray | None  # [stage, rank]: modelled bytes
    peak_memory: float  # byte, maximum over ranks
    kernels: dict | None  # kind = "kernels": implementation -> {"samples": [rep], s, slowest rank; errors}
    unknown_stages: tuple  # stages of a newer minor schema, which this reader leaves out
    phases: dict | None = None  # phase of the launch that a step's attention is -> [rank]: median in s

    def __getitem__(self, key):
        return self.parameters[key]

    def get(self, key, fallback=None):
        return self.parameters.get(key, fallback)

    @property
    def valid(self):
        return self.get("validity") == "VALID"

    @property
    def kind(self):
        return self.get("task.kind", "unknown")

    @property
    def layout(self):
        return f"{self['heads']}x{self['kv']}"

    def times(self, mode):
        return self.modes.get(mode)

    def step_samples(self):
        """Samples of a step in seconds, of mode `total`, or of `branches` where `total` did not run."""
        times = self.modes.get("total") or self.modes.get("branches")
        return np.array([]) if times is None else times.slowest[STAGES.index("step")]

    def step_summary(self):
        """Statistics of step_samples: {name of STATISTICS: value}."""
        times = self.modes.get("total") or self.modes.get("branches")
        if times is None:
            return summarise([])
        return {name: values[STAGES.index("step")].item() for name, values in times.summary.items()}


def mode_times(samples):
    """ModeTimes of each entry of samples [entry, stage, rank, rep], without warm-up."""
    _, median, low, _ = median_and_interval(samples)
    compute = samples[:, : len(COMPUTE_STAGES)]
    timed = ~np.isnan(compute).all(axis=1)
    sums = np.where(timed, np.nansum(compute, axis=1), np.nan)
    slowest = np.fmax.reduce(samples, axis=2)
    statistics = np.stack([*summaries(slowest).values()], axis=1)
    return list(map(ModeTimes, slowest, median, low, median_and_interval(sums)[1], statistics))


BLOCK = 256  # points whose samples are in memory at a time


def in_blocks(items):
    """The items in lists of at most BLOCK."""
    return [items[i : i + BLOCK] for i in range(0, len(items), BLOCK)]


def by_shape(items):
    """[(keys, stacked arrays)] of (key, array) pairs, one for each shape of the arrays."""
    groups = {}
    for key, array in items:
        groups.setdefault(array.shape, []).append((key, array))
    return [([key for key, _ in group], np.stack([array for _, array in group])) for group in groups.values()]


def samples_by_mode(group, size, warmup):
    """({mode: samples [stage, rank, rep] in s without warm-up, stages as STAGES}, labels of the stages, ranks)."""
    time = load_numbers(group, "time", size, 4)
    modes, stages = load_labels(group, "mode", size), load_labels(group, "stage", size)
    if time.shape[:2] != (len(modes), len(stages)):
        raise ValueError("the shape of 'time' does not match its labels")
    if not 0 <= warmup <= time.shape[3]:
        raise ValueError(f"warmup_reps = {warmup} with {time.shape[3]} repetitions")
    missing = [s for s in STAGES if s not in stages]
    if missing:
        raise ValueError(f"'stage' lacks {', '.join(missing)}")
    if (time < 0).any() or np.isinf(time).any():
        raise ValueError("'time' has negative or infinite samples")
    known = time[:, [stages.index(s) for s in STAGES], :, warmup:]
    return dict(zip(modes, known)), stages, time.shape[2]


def last_reads(group, members, size):
    """(reads by "counted" and "expected", nsa-vibe's formula), both at the last step; reads are summed over ranks."""
    if "reads" not in members:
        return {}, float("nan")
    reads = {}
    for key, name in ("counted", "reads"), ("expected", "reads_expected"):
        table = load_numbers(group, name, size, 3)
        if table.shape[0] != len(BRANCHES):
            raise ValueError(f"'{name}' has {table.shape[0]} branches")
        reads[key] = table[:, :, -1].sum(axis=1) if table.shape[2] else np.zeros(len(BRANCHES))
    nsa_vibe = load_numbers(group, "reads_nsa_vibe", size, 1) if "reads_nsa_vibe" in members else []
    return reads, float(nsa_vibe[-1]) if len(nsa_vibe) else float("nan")


def kernel_samples(kernels, size, warmup):
    """(implementations, samples [implementation, rank, rep] in s without warm-up) of the group `kernels`."""
    names, time = load_labels(kernels, "implementation", size), load_numbers(kernels, "time", size, 3)
    if time.shape[0] != len(names):
        raise ValueError("the shape of 'kernels/time' does not match its labels")
    return names, time[:, :, to_python(kernels.attrs.get("warmup_reps", warmup)) :]


def read_kernels(group, size):
    """Samples and errors by implementation, of kind = "kernels"."""
    kernels = group["kernels"]
    names, time = kernel_samples(kernels, size, to_python(group.attrs.get("warmup_reps", 0)))
    errors = {name: load_numbers(kernels, name, size, 1) for name in ("mean_abs_err", "max_abs_err") if name in kernels}
    return {
        name: {"samples": np.fmax.reduce(time[i], axis=0)} | {e: float(v[i]) for e, v in errors.items()}
        for i, name in enumerate(names)
    }


def read_phases(group, size, ranks, warmup):
    """Medians by phase and rank of a decode step whose ranks exchange in one launch."""
    names, time = load_labels(group["phases"], "phase", size), load_numbers(group["phases"], "time", size, 3)
    if time.shape[:2] != (len(names), ranks):
        raise ValueError("the shape of 'phases/time' does not match its labels")
    return dict(zip(names, median_and_interval(time[:, :, warmup:])[1]))


def read_points(run, names, file, size):
    """Points of these names. Times of many points are summarised together, since each has few samples."""
    points, groups, shapes = [], file["points"], {}
    for block in in_blocks(names):
        samples = []  # ((point, mode), [stage, rank, rep])
        for name in block:
            point, of_point = read_point(run, name, groups[name], size, shapes)
            points.append(point)
            samples += [((point, mode), of_mode) for mode, of_mode in of_point.items()]
            point.modes.update(dict.fromkeys(of_point))  # keeps their order
        for keys, stack in by_shape(samples):
            for (point, mode), times in zip(keys, mode_times(stack)):
                point.modes[mode] = times
    return points


def read_point(run, name, group, size, shapes):
    """(a Point without its `modes`, their samples); `shapes` as in attributes_of."""
    parameters = attributes_of(group, shapes)
    for key, kind in (("validity", str), ("heads", int), ("kv", int), ("warmup_reps", int), ("task.kind", str)):
        if not isinstance(parameters.get(key), kind):
            raise ValueError(f"attribute '{key}' of point {name} is missing or has another type")
    ranks, warmup = parameters["heads"] * parameters["kv"], parameters["warmup_reps"]
    members, samples, stages = members_of(group), {}, []
    if "time" in members:
        samples, stages, timed = samples_by_mode(group, size, warmup)
        if timed != ranks:
            raise ValueError(f"point {name} has times of {timed} ranks (heads x kv = {ranks})")
    reads, nsa_vibe = last_reads(group, members, size)
    modelled = None
    if "bytes" in members:
        modelled = load_numbers(group, "bytes", size, 2)
        labels = stages or load_labels(group, "stage", size)
        modelled = modelled[[labels.index(s) for s in STAGES]]
    memory = float("nan")
    if "memory_peak" in members:
        total = load_labels(group, "kind", size).index("total")
        memory = float(load_numbers(group, "memory_peak", size, 2)[total].max(initial=0))
    point = Point(
        run,
        int(name),
        parameters,
        ranks,
        {},
        reads,
        nsa_vibe,
        modelled,
        memory,
        read_kernels(group, size) if "kernels" in members else None,
        tuple(s for s in stages if s not in STAGES),
        read_phases(group, size, ranks, warmup) if "phases" in members else None,
    )
    return point, samples


def read_system(file, size):
    """Columns of /system: name -> list over ranks."""
    system = {}
    for name, dataset in file["system"].items():
        if h5py.check_string_dtype(dataset.dtype) is not None:
            system[name] = load_labels(file["system"], name, size)
        else:
            system[name] = load_numbers(file["system"], name, size, 1).tolist()
    return system


def point_names(file):
    """Names of the groups of points, "0007" and so on; other programs may have added groups beside them."""
    return sorted(name for name in file["points"] if len(name) >= 4 and name.isdecimal() and name.isascii())


def read_file(path, part=0, parts=1):
    """The points of one file, or of one of `parts` equal parts of it. Raises FileError with the name of the file."""
    path = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            raise FileError(f"{path}: not a plain file; give files that `nsa run` wrote")
        size = os.path.getsize(path)
        with h5py.File(path, "r") as file:
            if "schema_version" not in file.attrs or "points" not in file:
                raise FileError(
                    f"{path}: not a result of nsa (no schema_version and points in it); give files that `nsa run` wrote"
                )
            attributes = attributes_of(file)
            major = str(attributes["schema_version"]).split(".")[0]
            if major != str(SCHEMA_MAJOR):
                raise FileError(
                    f"{path}: schema {attributes['schema_version']} (this version reads {SCHEMA_MAJOR}.x); "
                    "use the nsa_analysis of the version of nsa that wrote it"
                )
            run = Run(path, attributes, read_system(file, size))
            names = point_names(file)
            chosen = names[len(names) * part // parts : len(names) * (part + 1) // parts]
            points = read_points(run, chosen, file, size)
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise FileError(
            f"{path}: cannot be read as HDF5 ({first_line(error)}); "
            "it may be truncated or of another format: copy it again"
        ) from None
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, UnicodeError) as error:
        raise FileError(f"{path}: not a complete result of nsa ({first_line(error)}); run it again") from None
    if not names:
        raise FileError(
            f"{path}: has no point (status {attributes.get('status', 'unknown')}); "
            "wait until the run has written its first point"
        )
    return points


def read_samples(point):
    """Raw samples of a point from its file: {mode: (labels, samples [label, rank, rep] in s without warm-up)}.

    The labels are STAGES; of mode "kernels", which is that of kernel points, the implementations.
    """
    return samples_of(point.run.path, [point])[0]


def samples_of(path, points):
    """read_samples of several points of one file."""
    with h5py.File(path, "r") as file:
        return [samples_in(file, os.path.getsize(path), point) for point in points]


def samples_in(file, size, point):
    group, warmup = file[f"points/{point.index:04d}"], point["warmup_reps"]
    found = samples_by_mode(group, size, warmup)[0] if "time" in group else {}
    modes = {mode: (STAGES, samples) for mode, samples in found.items()}
    return modes | ({"kernels": kernel_samples(group["kernels"], size, warmup)} if "kernels" in group else {})


def first_line(error):
    text = str(error.args[0] if error.args else error)
    return text.splitlines()[0].removeprefix('"').removesuffix('"') if text else type(error).__name__


def result_files(folder):
    """The .h5 files below a folder but hidden ones, such as the ._a.h5 of macOS."""
    return [f for f in folder.rglob("*.h5") if not f.name.startswith(".")]


def find_files(paths):
    """Files as given, and every .h5 file below the folders."""
    files = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            inside = sorted(result_files(path))
            if not inside:
                raise AnalysisError(f"{path}: no .h5 file in this folder; give result files of `nsa run`")
            files += inside
        else:
            files.append(path)
    if not files:
        raise AnalysisError("no file given; give result files of `nsa run`, or folders of them")
    return list(dict.fromkeys(str(f) for f in files))


def read(paths):
    """Every point of every file. `paths` is one path or several; folders are searched for .h5 files."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    calls = []
    for path in find_files(paths):
        parts = 1 + min(15, os.path.getsize(path) // LARGE) if os.path.isfile(path) else 1
        calls += [(path, part, parts) for part in range(parts)]
    large = sum(os.path.getsize(path) for path, *_ in calls if os.path.isfile(path)) > LARGE
    found = parallel(read_file, calls) if large else [read_file(*call) for call in calls]
    return [point for points in found for point in points]
