"""The list of a sweep and its runs. Python 3.6: login nodes may have nothing newer."""

import hashlib
import os
import re
import shlex
import subprocess
from collections import namedtuple

BAD_INPUT = 2
MAX_NAME = 100  # characters

Case = namedtuple("Case", "ranks heads kv input options")
Group = namedtuple("Group", "number ranks layouts input options")


class UsageError(Exception):
    """A message for the user: what, why, what to do."""


def parse_list(path):
    """The lines of the list as Groups. Raises UsageError with file and line."""
    groups = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read %s (%s); give the path of a sweep list" % (path, error)) from None
    for number, line in enumerate(lines, 1):
        where = "%s:%d: " % (path, number)
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(where + "%s; close the quotation" % error) from None
        if not words:
            continue
        if len(words) < 3:
            raise UsageError(where + "a line is: ranks, heads x kv, input, options; see --help")
        if not re.match(r"^[1-9][0-9]*(,[1-9][0-9]*)*$", words[0]):
            raise UsageError(where + "%r (not rank counts); give positive numbers, like 1,2,4" % words[0])
        ranks = [int(word) for word in words[0].split(",")]
        layouts = words[1].split(",")
        for layout in layouts:
            if layout not in ("all", "auto") and not re.match(r"^[1-9]\d*x[1-9]\d*$", layout):
                raise UsageError(where + "%r (not a layout); give heads x kv like 2x4, all or auto" % layout)
        if not os.path.isfile(words[2]):
            raise UsageError(where + "%s (no such file); give the path of an input from here" % words[2])
        groups.append(Group(number, ranks, layouts, words[2], tuple(words[3:])))
    return groups


def allowed(nsa, case):
    """(whether the input allows this layout, message of nsa if not), from a dry run of nsa."""
    command = [nsa, "run", case.input, "--dry-run", "--ranks", str(case.ranks)] + settings(case)
    try:
        plan = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    except OSError as error:
        raise UsageError("cannot start %s (%s); give the program with --nsa" % (nsa, error.strerror)) from None
    if plan.returncode not in (0, BAD_INPUT):
        raise UsageError("%s failed: %s" % (" ".join(command), plan.stderr.strip()))
    return plan.returncode == 0, plan.stderr.strip()


def settings(case):
    layout = []
    for name, value in (("heads", case.heads), ("kv", case.kv)):
        if value is not None:
            layout += ["--set", "parallel.%s=%d" % (name, value)]
    return layout + list(case.options)


def layouts_of(nsa, group, ranks):
    """Cases of one rank count."""
    for layout in group.layouts:
        if layout == "auto":
            yield Case(ranks, None, None, group.input, group.options)
        elif layout == "all":
            tried = [Case(ranks, h, ranks // h, group.input, group.options)
                     for h in range(1, ranks + 1) if ranks % h == 0]
            answers = [(case, allowed(nsa, case)) for case in tried]
            if not any(answer[0] for _, answer in answers):
                raise UsageError("line %d: no heads x kv of %d ranks fits %s: %s"
                                 % (group.number, ranks, group.input, answers[0][1][1]))
            for case, answer in answers:
                if answer[0]:
                    yield case
        else:
            heads, kv = map(int, layout.split("x"))
            if heads * kv == ranks:
                yield Case(ranks, heads, kv, group.input, group.options)


def expand(nsa, groups):
    """Every run once, in the order of the list. Raises UsageError for a layout that fits no rank count of its line."""
    cases = []
    for group in groups:
        for layout in group.layouts:
            heads, _, kv = layout.partition("x")
            if kv and int(heads) * int(kv) not in group.ranks:
                raise UsageError("line %d: layout %s (not of %s ranks); heads x kv is the rank count"
                                 % (group.number, layout, " or ".join(map(str, group.ranks))))
        for ranks in group.ranks:
            for case in layouts_of(nsa, group, ranks):
                if case not in cases:
                    cases.append(case)
    if not cases:
        raise UsageError("the list is empty; see --help")
    return cases


def readable(options):
    """The options as a part of a file name: "--set run.context=[64,128] --strict" is "context-64-128_strict"."""
    words = []
    for option in options:
        if option != "--set":
            option = re.sub(r"^--|^[a-z]+\.(?=\w+=)", "", option)
            words.append(re.sub(r"[^A-Za-z0-9._]+", "-", option).strip("-"))
    return "_".join(word for word in words if word)


def name_of(case):
    """Base name of a run's files."""
    name = os.path.splitext(os.path.basename(case.input))[0] + "_r%d" % case.ranks
    name += "_auto" if case.heads is None else "_h%d_kv%d" % (case.heads, case.kv)
    return name + ("_" + readable(case.options) if case.options else "")


def with_hash(case):
    """The same where it would be too long or another run's too."""
    return name_of(case)[:MAX_NAME - 9] + "_" + hashlib.sha256(repr(case).encode()).hexdigest()[:8]


def names_of(cases, results):
    """{case: base name of its files}."""
    names = [name_of(case) for case in cases]
    unique = {case: with_hash(case) if len(name) > MAX_NAME or names.count(name) > 1 else name
              for case, name in zip(cases, names)}
    return {case: earlier_name(case, results) or name for case, name in unique.items()}


def earlier_name(case, results):
    """The name that its result has where an earlier version made it: with a hash in the place of the options."""
    name = name_of(case._replace(options=())) + "_" + hashlib.sha256("\0".join(case.options).encode()).hexdigest()[:8]
    return name if case.options and os.path.exists(os.path.join(results, name + ".h5")) else None
