"""Series: points that are comparable on one curve. They differ only in ranks, layout and the swept sizes."""

import fnmatch
import pathlib
import shlex

from ..errors import AnalysisError

# Parameters that are swept along a curve, and parameters that say how a point was measured, not what.
SWEPT = ("run.context", "run.batch", "run.force_branch")
NOT_COMPARED = (
    "parallel.",
    "output.",
    "run.modes",
    "run.warmup",
    "run.min_time",
    "run.check",
    "run.backend",
    "needle.",
    "kernels.",
)
MAX_SHOWN = 5  # differences whose values a message shows


def identity(point):
    """Values that all points of a curve must share, by name."""
    compared = {
        key: value
        for key, value in sorted(point.parameters.items())
        if "." in key and key not in SWEPT and not key.startswith(NOT_COMPARED)
    }
    run = point.run.attributes
    return {
        "device": point.run.device,
        "backend": run.get("backend", "unknown"),
        "git_commit": run.get("git_commit", "unknown"),
    } | {k: str(v) for k, v in compared.items()}


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


def where(points, conditions):
    """Points that satisfy every `NAME=VALUE[,VALUE...]`; a value may contain * and ?."""
    for condition in conditions or []:
        name, equals, wanted = condition.partition("=")
        if not equals:
            raise AnalysisError(f"--where {condition}: no '='; write it as --where run.context=65536")
        if all(value_of(p, name) is None for p in points):
            raise AnalysisError(
                f"--where {condition}: no point has '{name}'; "
                "use a name of the input such as run.context, or device, ranks, layout, file"
            )
        # A value may itself contain commas, so the whole text is one of the choices.
        choices = [wanted, *wanted.split(",")]
        points = [
            p
            for p in points
            if any(str(value_of(p, name)) == c or fnmatch.fnmatchcase(str(value_of(p, name)), c) for c in choices)
        ]
    if not points:
        raise AnalysisError(f"no point is left (--where {' '.join(conditions or [])}); relax the conditions")
    return points


def latest(points):
    """(points, warnings): of points with equal identity, layout and size, the latest run is kept.

    There is one warning for each point that is left out.
    """
    kept, warnings = {}, []
    for point in sorted(points, key=lambda p: str(p.run.attributes.get("start", ""))):
        key = (*identity(point).items(), point.layout, *(point.get(k) for k in SWEPT))
        if key in kept:
            warnings.append(
                f"{kept[key].run.path} and {point.run.path} measured the same point "
                f"({size_text(point)}, {point.layout}); the later one is used"
            )
        kept[key] = point
    return list(kept.values()), list(dict.fromkeys(warnings))


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


def title(point):
    """One line that says what a series measured."""
    get = point.get
    model = (
        f"H={get('model.n_heads')} G={get('model.n_kv_groups')} D={get('model.d_k')}/{get('model.d_v')} "
        f"{get('model.precision')}"
    )
    return f"{point.kind} on {point.run.device}: {model}, {get('run.scope', 'layer')}"


def titles(groups, of=title):
    """A title for each series. Where several would be equal, what differs is added."""
    names = [of(g[0]) for g in groups]
    result = []
    for i, name in enumerate(names):
        alike = [g for g, n in zip(groups, names) if n == name]
        added = [
            f"{key} {str(identity(groups[i][0]).get(key, '-'))[:16]}" for key in differences(alike) if key not in name
        ]
        result.append(", ".join([name, *added[:3]]))
    return result


def shown_paths(paths):
    """Paths for a shell command. Many files that are all the files of a folder become the folder."""
    paths = list(map(str, paths))
    folders = {pathlib.Path(p).parent for p in paths}
    if len(paths) > 8 and len(folders) == 1:
        folder = folders.pop()
        if {str(f) for f in folder.rglob("*.h5")} == set(paths):
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
