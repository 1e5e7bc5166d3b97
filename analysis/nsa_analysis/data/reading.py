"""Result files into points. A point keeps what the tables need: the samples of the slowest rank, and medians of
every rank. So hundreds of files of hundreds of ranks fit into memory; raw samples stay in the files."""

import dataclasses
import os
import pathlib

import h5py
import numpy as np

from ..errors import AnalysisError, FileError
from .statistics import median_and_interval

SCHEMA_MAJOR = 1
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
WORK = STAGES[:-2]  # what a rank does itself
BRANCHES = ("cmp", "sel", "win")


@dataclasses.dataclass(frozen=True)
class Run:
    """One file: attributes of `/` and columns of `/system`."""

    path: str
    attributes: dict
    system: dict  # name -> list over ranks

    @property
    def device(self):
        """`NVIDIA H200`, or the processor on the host backend; all of them where ranks differ."""
        names = self.system.get("gpu" if self.attributes.get("backend") == "cuda" else "cpu", [])
        return " + ".join(sorted(set(filter(None, names)))) or "unknown device"

    @property
    def crowded(self):
        """(ranks, threads, cores) of the first rank whose cores have more threads than cores; None if there is none.

        Ranks then take turns: times are right and say nothing about so many cores. Files before schema 1.2 do not tell.
        """
        if self.attributes.get("backend") != "host":
            return None
        columns = (self.system.get(name, []) for name in ("sharers", "threads", "cores"))
        return next(((r, t, c) for r, t, c in zip(*columns) if r * t > c), None)


@dataclasses.dataclass(frozen=True)
class ModeTimes:
    """One mode of a point, warm-up left out, in seconds; NaN where a stage was not timed."""

    slowest: np.ndarray  # [stage, rep]: the slowest rank's
    rank_median: np.ndarray  # [stage, rank]
    rank_low: np.ndarray  # [stage, rank]: low end of the median's interval
    work_median: np.ndarray  # [rank]: of the sum of its own stages


@dataclasses.dataclass(frozen=True)
class Point:
    run: Run
    index: int
    parameters: dict  # every attribute of the point, by its name in the file
    ranks: int
    modes: dict  # name -> ModeTimes
    reads: dict  # "counted", "expected" -> [branch], at the last step, summed over ranks
    reads_nsa_vibe: float
    bytes: np.ndarray | None  # [stage, rank]
    peak_memory: float  # byte, largest of any rank
    kernels: dict | None  # kind = "kernels": implementation -> {"samples": [rep] of the slowest rank, s; errors}
    unknown_stages: tuple  # of a newer minor schema: this reader leaves them out

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
        """Seconds a step: mode `total`, or `branches` where that did not run."""
        times = self.modes.get("total") or self.modes.get("branches")
        return np.array([]) if times is None else times.slowest[STAGES.index("step")]


def plain(value):
    """An attribute as a Python value."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def attributes_of(item):
    return {
        name: plain(value) for name, value in item.attrs.items() if name not in ("DIMENSION_LIST", "REFERENCE_LIST")
    }


def load(group, name, size, dimensions):
    """A dataset of numbers with that many dimensions; never one that claims to be larger than its file."""
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "if":
        raise ValueError(f"'{name}' holds no numbers")
    if dataset.ndim != dimensions:
        raise ValueError(f"'{name}' has {dataset.ndim} dimensions (expected {dimensions})")
    if dataset.size * dataset.dtype.itemsize > size:
        raise ValueError(f"'{name}' claims to be larger than its file")
    return dataset[()]


def labels(group, name, size):
    dataset = group[name]
    if h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim != 1:
        raise ValueError(f"'{name}' holds no labels")
    if dataset.size > size:
        raise ValueError(f"'{name}' claims to be larger than its file")
    return list(dataset.asstr()[()])


def mode_times(samples):
    """samples [stage, rank, rep] of one mode without warm-up."""
    _, median, low, _ = median_and_interval(samples)
    own = samples[: len(WORK)]
    timed = ~np.isnan(own).all(axis=0)
    work = np.where(timed, np.nansum(own, axis=0), np.nan)
    return ModeTimes(np.fmax.reduce(samples, axis=1), median, low, median_and_interval(work)[1])


def read_times(group, size, warmup):
    time = load(group, "time", size, 4)
    modes, stages = labels(group, "mode", size), labels(group, "stage", size)
    if time.shape[:2] != (len(modes), len(stages)):
        raise ValueError("'time' has another shape than its labels")
    if not 0 <= warmup <= time.shape[3]:
        raise ValueError(f"warmup_reps = {warmup} of {time.shape[3]} repetitions")
    missing = [s for s in STAGES if s not in stages]
    if missing:
        raise ValueError(f"'stage' lacks {', '.join(missing)}")
    order = [stages.index(s) for s in STAGES]
    if (time < 0).any() or np.isinf(time).any():
        raise ValueError("'time' holds samples that are no times (negative or infinite)")
    times = {mode: mode_times(time[m][order][:, :, warmup:]) for m, mode in enumerate(modes)}
    return times, time.shape[2], tuple(s for s in stages if s not in STAGES)


def last_reads(group, size):
    """Counted and expected reads at the last step by branch, summed over ranks; nsa-vibe's formula there."""
    if "reads" not in group:
        return {}, float("nan")
    reads = {}
    for key, name in ("counted", "reads"), ("expected", "reads_expected"):
        table = load(group, name, size, 3)
        if table.shape[0] != len(BRANCHES):
            raise ValueError(f"'{name}' has {table.shape[0]} branches")
        reads[key] = table[:, :, -1].sum(axis=1) if table.shape[2] else np.zeros(len(BRANCHES))
    vibe = load(group, "reads_nsa_vibe", size, 1) if "reads_nsa_vibe" in group else []
    return reads, float(vibe[-1]) if len(vibe) else float("nan")


def read_kernels(group, size):
    if "kernels" not in group:
        return None
    kernels = group["kernels"]
    names, time = labels(kernels, "implementation", size), load(kernels, "time", size, 3)
    if time.shape[0] != len(names):
        raise ValueError("'kernels/time' has another shape than its labels")
    warmup = plain(kernels.attrs.get("warmup_reps", group.attrs.get("warmup_reps", 0)))
    errors = {name: load(kernels, name, size, 1) for name in ("mean_abs_err", "max_abs_err") if name in kernels}
    return {
        name: {"samples": np.fmax.reduce(time[i, :, warmup:], axis=0)} | {e: float(v[i]) for e, v in errors.items()}
        for i, name in enumerate(names)
    }


def read_point(run, name, group, size):
    parameters = attributes_of(group)
    for key, kind in (("validity", str), ("heads", int), ("kv", int), ("warmup_reps", int), ("task.kind", str)):
        if not isinstance(parameters.get(key), kind):
            raise ValueError(f"attribute '{key}' of point {name} is missing or of another type")
    ranks = parameters["heads"] * parameters["kv"]
    modes, unknown = {}, ()
    if "time" in group:
        modes, timed, unknown = read_times(group, size, parameters["warmup_reps"])
        if timed != ranks:
            raise ValueError(f"point {name} has times of {timed} ranks (heads x kv = {ranks})")
    reads, vibe = last_reads(group, size)
    moved = None
    if "bytes" in group:
        moved = load(group, "bytes", size, 2)
        moved = moved[[labels(group, "stage", size).index(s) for s in STAGES]]
    memory = float("nan")
    if "memory_peak" in group:
        memory = float(load(group, "memory_peak", size, 2)[labels(group, "kind", size).index("total")].max(initial=0))
    return Point(
        run, int(name), parameters, ranks, modes, reads, vibe, moved, memory, read_kernels(group, size), unknown
    )


def read_system(file, size):
    """Columns over ranks; a file of another program has none."""
    system = {}
    for name, dataset in file["system"].items():
        if h5py.check_string_dtype(dataset.dtype) is not None:
            system[name] = labels(file["system"], name, size)
        else:
            system[name] = load(file["system"], name, size, 1).tolist()
    return system


def read_file(path):
    """The points of one file. Raises FileError, which names the file."""
    path = os.fspath(path)
    try:
        size = os.path.getsize(path)
        with h5py.File(path, "r") as file:
            if "schema_version" not in file.attrs or "points" not in file:
                raise FileError(
                    f"{path}: no result of nsa (HDF5 without schema_version and points); "
                    "give files that `nsa run` wrote"
                )
            attributes = attributes_of(file)
            major = str(attributes["schema_version"]).split(".")[0]
            if major != str(SCHEMA_MAJOR):
                raise FileError(
                    f"{path}: schema {attributes['schema_version']} (this reader knows {SCHEMA_MAJOR}.x); "
                    "use the nsa_analysis of the nsa that wrote it"
                )
            run = Run(path, attributes, read_system(file, size))
            points = [read_point(run, name, file["points"][name], size) for name in sorted(file["points"])]
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise FileError(
            f"{path}: cannot be read as HDF5 ({first_line(error)}); "
            "it may be truncated or of another kind: copy it again"
        ) from None
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, UnicodeError) as error:
        raise FileError(f"{path}: not a whole result of nsa ({first_line(error)}); run it again") from None
    if not points:
        raise FileError(
            f"{path}: holds no point (status {attributes.get('status', 'unknown')}); let the run seal its first point"
        )
    return points


def first_line(error):
    text = str(error.args[0] if error.args else error)
    return text.splitlines()[0].removeprefix('"').removesuffix('"') if text else type(error).__name__


def find_files(paths):
    """Files as given; folders give every .h5 below them."""
    files = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            inside = sorted(path.rglob("*.h5"))
            if not inside:
                raise AnalysisError(f"{path}: no .h5 file in this folder; give result files of `nsa run`")
            files += inside
        else:
            files.append(path)
    if not files:
        raise AnalysisError("no file given; give result files of `nsa run`, or folders that hold them")
    return list(dict.fromkeys(str(f) for f in files))


def read(paths):
    """Every point of every file: `paths` is one path, or several; folders are searched for .h5 files."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    return [point for path in find_files(paths) for point in read_file(path)]
