"""Which points may stand on one curve: those that differ in nothing but the ranks and the swept size."""

import fnmatch
import pathlib
import shlex

from ..errors import AnalysisError

# Parameters that are swept along a curve, or that say how it was measured and not what was.
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


MOST_TOLD = 5  # differences that a message gives the values of


def identity(point):
    """Everything that two points of a curve must share, by name."""
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
    """Series: lists of points of one identity each, in order of appearance."""
    series = {}
    for point in points:
        series.setdefault(tuple(identity(point).items()), []).append(point)
    return list(series.values())


def differences(series):
    """Names whose values differ between series, with the values: {name: [value of each series]}."""
    identities = [identity(s[0]) for s in series]
    names = dict.fromkeys(name for i in identities for name in i)
    return {
        name: [i.get(name, "-") for i in identities]
        for name in names
        if len({i.get(name, "-") for i in identities}) > 1
    }


def one_series(points, what):
    """The points, if they may stand on one curve; else AnalysisError says what differs and in which files."""
    series = split(points)
    if len(series) <= 1:
        return points
    lines, names = [], differences(series)
    # What tells most comes first: a wall of parameters names nothing.
    told = [n for n in ("device", "backend", "git_commit", "task.kind") if n in names]
    told += [n for n in names if n not in told]
    for name in told[:MOST_TOLD]:
        values = names[name]
        by_value = {}
        for value, members in zip(values, series):
            by_value.setdefault(value, []).append(members[0].run.path)
        lines.append(f"{name} " + ", ".join(f"{v} ({paths[0]})" for v, paths in by_value.items()))
    if len(told) > MOST_TOLD:
        lines.append(f"and {len(told) - MOST_TOLD} more: {', '.join(told[MOST_TOLD:])}")
    raise AnalysisError(
        f"these files cannot share a {what} (they differ in {'; '.join(lines)}); "
        "give files of one kind, or choose with --where NAME=VALUE"
    )


def value_of(point, name):
    """A parameter by its name, or by the last part of it; None where the point has none."""
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
    """Points that meet every `NAME=VALUE[,VALUE...]`; a value may hold * and ?."""
    for condition in conditions or []:
        name, equals, wanted = condition.partition("=")
        if not equals:
            raise AnalysisError(f"--where {condition}: no '='; write it as --where run.context=65536")
        if all(value_of(p, name) is None for p in points):
            raise AnalysisError(
                f"--where {condition}: no point has '{name}'; "
                "use a name of the input such as run.context, or device, ranks, layout, file"
            )
        # A value may itself hold commas: the whole is tried first.
        choices = [wanted, *wanted.split(",")]
        points = [
            p
            for p in points
            if any(str(value_of(p, name)) == c or fnmatch.fnmatchcase(str(value_of(p, name)), c) for c in choices)
        ]
    if not points:
        raise AnalysisError(f"no point is left (--where {' '.join(conditions or [])}); ask for less")
    return points


def latest(points):
    """One point a measurement: of points that measured the same (identity, layout, size) the latest run counts.

    Returns the points and a warning for each one left out.
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


def short(count):
    """65536 -> 64K, 1048576 -> 1M."""
    for unit, size in ("M", 1 << 20), ("K", 1 << 10):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def size_text(point):
    """What point of a sweep this is: `context 64K, batch 8`."""
    text = f"context {short(point.get('run.context', 0))}, batch {point.get('run.batch', 1)}"
    forced = point.get("run.force_branch", "none")
    return text if forced == "none" else f"{text}, forced {forced}"


def title(point):
    """One line that tells what a series measured."""
    get = point.get
    model = (
        f"H={get('model.n_heads')} G={get('model.n_kv_groups')} D={get('model.d_k')}/{get('model.d_v')} "
        f"{get('model.precision')}"
    )
    return f"{point.kind} on {point.run.device}: {model}, {get('run.scope', 'layer')}"


def titles(groups, of=title):
    """A title for each series; what they differ in is added where several would have the same."""
    names = [of(g[0]) for g in groups]
    result = []
    for i, name in enumerate(names):
        alike = [g for g, n in zip(groups, names) if n == name]
        said = [
            f"{key} {str(identity(groups[i][0]).get(key, '-'))[:16]}" for key in differences(alike) if key not in name
        ]
        result.append(", ".join([name, *said[:3]]))
    return result


def shown_paths(paths):
    """Paths as one would type them: many files that are all of a folder become the folder."""
    paths = list(map(str, paths))
    folders = {pathlib.Path(p).parent for p in paths}
    if len(paths) > 8 and len(folders) == 1:
        folder = folders.pop()
        if {str(f) for f in folder.rglob("*.h5")} == set(paths):
            return [str(folder)]
    return paths


def command(verb, members, groups, paths, *options):
    """The shell command that makes a table or figure of one of the series that these paths hold."""
    left, chosen = [g for g in groups if g is not members], []
    while left:
        names = differences([members, *left])
        # The condition that leaves fewest other series; of several the plainest, then the shortest.
        best = min(
            names,
            key=lambda n: (
                sum(v == names[n][0] for v in names[n][1:]),
                n not in ("task.kind", "device"),
                len(f"{n}{names[n][0]}"),
            ),
        )
        value = names[best][0]
        chosen += ["--where", f"{best}={value}"]
        left = [g for g, v in zip(left, names[best][1:]) if v == value]
    return shlex.join(["nsa-analysis", verb, *shown_paths(paths), *chosen, *options])
