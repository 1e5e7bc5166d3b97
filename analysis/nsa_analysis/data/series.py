"""Series: points that are comparable on one curve. They differ only in ranks, layout and the swept sizes."""

import fnmatch
import functools
import pathlib
import shlex
import warnings

from ..errors import AnalysisError, LeftOut
from .reading import result_files

# Parameters that are swept along a curve; in kernel points the shape too.
SWEPT = ("run.context", "run.batch", "run.force_branch")
KERNEL_SHAPE = tuple(f"kernels.{name}" for name in ("branch", "rows", "heads", "head_size", "blocks", "spans"))
# Parameters that say how a point was measured or where it went, not what was computed, and the layout, which the
# attributes `heads` and `kv` hold. Every other parameter counts (docs/METRICS.md, "The report").
NOT_COMPARED = (
    "parallel.heads",
    "parallel.kv",
    "run.backend",
    "run.modes",
    "run.warmup",
    "run.min_time",
    "run.min_interval",
    "run.interval_time",
    "run.throttle_threshold",
    "run.recovery_delay",
    "run.copy_bytes",
    "run.deadline",
    "run.check",
    "output.file",
    "output.csv",
    "output.tensors",
    "output.selection",
)
TASK_SECTIONS = ("kernels", "needle")  # sections that only the task of that name reads
MAX_SHOWN = 5  # differences whose values a message shows


def is_compared(key, kind):
    """Whether points of a curve must agree in this attribute of a point of this task."""
    section, dot, _ = key.partition(".")
    if not dot or key in SWEPT or key in NOT_COMPARED or (section in TASK_SECTIONS and section != kind):
        return False
    if key == "run.steps":  # of other tasks than decode it counts repetitions of the same work
        return kind == "decode"
    return not (kind == "kernels" and key in KERNEL_SHAPE)


@functools.lru_cache(maxsize=64)  # the points of a file have the same names
def compared_keys(kind, names):
    """Those of the names in which points of a curve must agree, sorted."""
    return tuple(sorted(key for key in names if is_compared(key, kind)))


CHUNKS = "parallel.kv_chunk_blocks"


def value_compared(point, key):
    """Value of a parameter as points of a curve must share it: text, or `auto` where the input leaves it open.

    Chunks of a prefill that are `auto` grow with the context, so their number differs along a curve.
    """
    if key != CHUNKS or point.kind != "prefill":
        return str(point.parameters[key])
    left_open = 'kv_chunk_blocks = "auto"' in str(point.run.attributes.get("config", ""))
    return "auto" if left_open else str(point[key])


def identity(point):
    """Values that all points of a curve must share, by name."""
    run = point.run.attributes
    routes = zip(("cmp", "sel", "win"), point.get("routes", []), point.get("route_reasons", []))
    forced = {f"NSA_ROUTE_{name.upper()}": route for name, route, why in routes if "NSA_ROUTE_" in str(why)}
    compared = compared_keys(point.kind, tuple(point.parameters))
    return {
        "device": point.run.device,
        "backend": run.get("backend", "unknown"),
        "git_commit": run.get("git_commit", "unknown"),
    } | {key: value_compared(point, key) for key in compared} | forced


def split(points):
    """Lists of points with equal identity, in order of appearance."""
    series = {}
    for point in points:
        series.setdefault(tuple(identity(point).items()), []).append(point)
    return list(series.values())


def differences(series):
    """{name: [value of each series]} of the names whose values differ."""
    identities = [identity(s[0]) for s in series]
    names = dict.fromkeys(name for i in identities for name in i)
    return {
        name: [i.get(name, "-") for i in identities]
        for name in names
        if len({i.get(name, "-") for i in identities}) > 1
    }


def one_series(points, what):
    """The points, if they form one series. Raises AnalysisError that says what differs and in which files."""
    series = split(points)
    if len(series) <= 1:
        return points
    lines, names = [], differences(series)
    # The most informative names come first; a message shows MAX_SHOWN of them.
    ordered = [n for n in ("device", "backend", "git_commit", "task.kind") if n in names]
    ordered += [n for n in names if n not in ordered]
    for name in ordered[:MAX_SHOWN]:
        values = names[name]
        by_value = {}
        for value, members in zip(values, series):
            by_value.setdefault(value, []).append(members[0].run.path)
        lines.append(f"{name} " + ", ".join(f"{v} ({paths[0]})" for v, paths in by_value.items()))
    if len(ordered) > MAX_SHOWN:
        lines.append(f"and {len(ordered) - MAX_SHOWN} more: {', '.join(ordered[MAX_SHOWN:])}")
    raise AnalysisError(
        f"these files cannot share a {what} (they differ in {'; '.join(lines)}); "
        "give files of one series, or select with --where NAME=VALUE"
    )


def value_of(point, name):
    """A parameter by its full name or its last part; None where the point has none."""
    if name in ("device", "backend", "git_commit"):
        return identity(point)[name]
    if name in ("ranks", "layout", "validity", "file"):
        return {
            "ranks": point.ranks,
            "layout": point.layout,
            "file": point.run.path,
            "validity": point.get("validity"),
        }[name]
    for key in (name, f"run.{name}", f"task.{name}"):
        if key in point.parameters:
            return point[key]
    return None


def equals(value, wanted):
    """Whether a value is the wanted one: as text with * and ?, or as a number; 64K and 1M are 2^16 and 2^20."""
    if str(value) == wanted or fnmatch.fnmatchcase(str(value), wanted):
        return True
    return isinstance(value, (int, float)) and value == number_of(wanted)


def number_of(text):
    """64K -> 65536, 1M -> 1048576, true -> 1, 0.5 -> 0.5; None where the text is no number."""
    text = text.strip().lower()
    if text in ("true", "false"):
        return int(text == "true")
    shift = {"k": 10, "m": 20, "g": 30}.get(text[-1:], 0)
    try:
        return float(text[:-1] if shift else text) * (1 << shift)
    except ValueError:
        return None


def where(points, conditions):
    """Points that satisfy every `NAME=VALUE[,VALUE...]`; a value may contain * and ?, a number may be 64K."""
    for condition in conditions or []:
        name, sign, wanted = condition.partition("=")
        if not sign:
            raise AnalysisError(f"--where {condition}: no '='; write it as --where run.context=65536")
        values = {str(v): v for v in (value_of(p, name) for p in points) if v is not None}
        if not values:
            raise AnalysisError(
                f"--where {condition}: no point has '{name}'; "
                "use a name of the input such as run.context, or device, ranks, layout, file"
            )
        # A value may itself contain commas, so the whole text is one of the choices.
        choices = [wanted, *wanted.split(",")]
        points = [p for p in points if any(equals(value_of(p, name), c) for c in choices)]
        if not points:
            shown = ", ".join([*values][:8]) + (", …" if len(values) > 8 else "")
            raise AnalysisError(f"--where {condition}: no point is left; here {name} is {shown}")
    return points


def leave_out(points, keep, why):
    """The points for which keep(point) holds. A warning (LeftOut) says how many others there are, and why.

    There is none where all are left out, which is an error of the caller.
    """
    kept = [p for p in points if keep(p)]
    lost = [p for p in points if not keep(p)]
    if kept and lost:
        files = list(dict.fromkeys(p.run.path for p in lost))
        named = files[0] if len(files) == 1 else f"{len(files)} files ({files[0]}, …)"
        warnings.warn(f"{len(lost)} of {len(points)} points are left out, {why}: {named}", LeftOut, stacklevel=2)
    return kept


def keep_latest(points):
    """The points of `latest`; a warning (LeftOut) for each point that is left out."""
    kept, lines = latest(points)
    for line in lines:
        warnings.warn(line, LeftOut, stacklevel=2)
    return kept


def latest(points):
    """(points, lines): of points with equal identity, layout and size, the latest run is kept, by start, then file.

    The order of the points does not matter. One line names each point that is left out, and the one that is used.
    """
    kept, lines = {}, []
    for point in sorted(points, key=lambda p: (str(p.run.attributes.get("start", "")), p.run.path, p.index)):
        key = (*identity(point).items(), point.layout, *(point.get(k) for k in SWEPT))
        if point.kind == "kernels":
            key += tuple(point.get(k) for k in KERNEL_SHAPE)
        if key in kept:
            lines.append(
                f"{kept[key].run.path} and {point.run.path} measured the same point "
                f"({size_text(point)}, {point.layout}); the later one is used ({point.run.path})"
            )
        kept[key] = point
    order = {id(p): i for i, p in enumerate(points)}
    return sorted(kept.values(), key=lambda p: order[id(p)]), list(dict.fromkeys(lines))


def format_count(count):
    """65536 -> 64K, 1048576 -> 1M."""
    for unit, size in ("M", 1 << 20), ("K", 1 << 10):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def size_text(point):
    """The swept sizes of a point: `context 64K, batch 8`."""
    text = f"context {format_count(point.get('run.context', 0))}, batch {point.get('run.batch', 1)}"
    forced = point.get("run.force_branch", "none")
    return text if forced == "none" else f"{text}, forced {forced}"


def title(point, device=True):
    """One line that says what a series measured; without the device for a comparison of devices."""
    get = point.get
    model = (
        f"H={get('model.n_heads')} G={get('model.n_kv_groups')} D={get('model.d_k')}/{get('model.d_v')} "
        f"{get('model.precision')}"
    )
    on = f" on {point.run.device}" if device else ""
    return f"{point.kind}{on}: {model}, {get('run.scope', 'layer')}"


def titles(groups, of=title):
    """A title for each series. Where several would be equal, the values that tell them apart are added."""
    names = [of(g[0]) for g in groups]
    result = []
    for members, name in zip(groups, names):
        own = identity(members[0])
        left = [identity(g[0]) for g, n in zip(groups, names) if n == name and g is not members]
        added = []
        for key in differences([g for g, n in zip(groups, names) if n == name]):
            if any(other.get(key) != own.get(key) for other in left):
                left = [other for other in left if other.get(key) == own.get(key)]
                added.append(f"{key} {str(own.get(key, '-'))[: 12 if key == 'git_commit' else 60]}")
        result.append(", ".join([name, *added]))
    return result


def shown_paths(paths):
    """Paths for a shell command. Many files that are all the files of a folder become the folder."""
    paths = list(map(str, paths))
    folders = {pathlib.Path(p).parent for p in paths}
    if len(paths) > 8 and len(folders) == 1:
        folder = folders.pop()
        if {str(f) for f in result_files(folder)} == set(paths):
            return [str(folder)]
    return paths


def shell_command(verb, members, groups, paths, *options):
    """The shell command that selects one series (`members`) of all `groups` of these paths."""
    left, selected = [g for g in groups if g is not members], []
    while left:
        names = differences([members, *left])
        # The condition that leaves the fewest other series; of equal ones task.kind or device, then the shortest.
        best = min(
            names,
            key=lambda n: (
                sum(v == names[n][0] for v in names[n][1:]),
                n not in ("task.kind", "device"),
                len(f"{n}{names[n][0]}"),
            ),
        )
        value = names[best][0]
        selected += ["--where", f"{best}={value}"]
        left = [g for g, v in zip(left, names[best][1:]) if v == value]
    return shlex.join(["nsa-analysis", verb, *shown_paths(paths), *selected, *options])
