"""The commands of the command line: each makes a table from its options and writes it."""

import os
import sys
import warnings
from contextlib import nullcontext

import pandas as pd

from .data import aiconfigurator, export, series
from .data.reading import find_files, read, read_file
from .data.statistics import STATISTICS
from .data.tables import kernels, points_table
from .errors import AnalysisError, LeftOut
from .figures import plots
from .models import cost_model, gate
from .models.balance import phases, ranks, stragglers, waiting
from .models.compare import compare, sides
from .models.linearity import linearity
from .models.machine import machine_text, write_machine
from .models.prediction import extrapolate
from .models.roofline import roofline
from .models.scaling import scaling
from .models.stages import branches, reads, with_stages
from .outputs import replacing
from .report.report import make_report
from .report.report_gate import gate_decisions
from .report.report_series import PREDICTION_COLUMNS
from .writing import (
    TERMINAL_COLUMNS,
    align_columns,
    save_figure,
    shown_columns,
    write_data,
    write_outputs,
    write_parquet,
    write_tables,
    write_text,
)


def network_from(options):
    """Network of the options. Raises AnalysisError if one is out of range."""
    if options.latency < 0 or options.link <= 0 or options.node < 1:
        raise AnalysisError("the network needs --latency >= 0, --link > 0 and --node >= 1; correct the option")
    return cost_model.Network(options.network, options.latency * 1e-6, options.link * 1e9, options.node)


def selected_points(options):
    """Points of the files that satisfy --where."""
    return series.where(read(options.files), options.where)


def tables_by_series(options, points, make, what):
    """make(points) of each series, joined; column `series` names it. With --figure there must be one series.

    A series that has no such table is named on stderr. Raises its AnalysisError where no series has one.
    """
    if options.figure:
        series.one_series(points, what)
    groups, frames, reasons = series.split(points) or [points], [], []
    for members, name in zip(groups, series.titles(groups) if points else [""]):
        try:
            frames.append(make(members).assign(series=name))
        except AnalysisError as reason:
            reasons.append((name, reason))
    if not frames:
        raise reasons[0][1]
    for name, reason in reasons:
        warnings.warn(f"{name}: {reason}", LeftOut, stacklevel=2)
    return pd.concat(frames, ignore_index=True)


def run_points(options):
    write_outputs(options, points_table(selected_points(options)))


def run_scaling(options):
    points = series.leave_out(selected_points(options), lambda p: p.modes, "never timed as a step")
    frame = tables_by_series(options, points, lambda members: scaling(members, options.kind), "scaling curve")
    write_tables(options, frame, plots.scaling_panels(frame) if options.figure else None)


def run_linearity(options):
    points = with_stages(selected_points(options))
    frame = tables_by_series(options, points, linearity, "waterfall")
    write_tables(options, frame, plots.linearity_panels(frame) if options.figure else None)


def run_branches(options):
    points = with_stages(selected_points(options))
    frame = tables_by_series(options, points, branches, "chart of stages")
    panels = plots.branch_panels(frame) + plots.reads_panels(reads(points)) if options.figure else None
    write_tables(options, frame, panels)


def run_reads(options):
    points = series.leave_out(selected_points(options), lambda p: p.reads, "without reads")
    frame = tables_by_series(options, points, reads, "chart of reads")
    write_tables(options, frame, plots.reads_panels(frame) if options.figure else None)


def selected_for_figure(options, what):
    """Selected points; with --figure they must form one series, since a figure shows only one."""
    points = selected_points(options)
    return series.one_series(points, what) if options.figure else points


def run_ranks(options):
    frame = ranks(selected_for_figure(options, "heat map of ranks"))
    write_outputs(options, frame, plots.rank_panels(frame) if options.figure else None)
    slow = stragglers(frame)
    if not (options.csv or options.json):
        print("\nstragglers: " + ("none" if slow.empty else "\n" + align_columns(slow, list(slow))))


def run_phases(options):
    frame = phases(selected_points(options))
    write_outputs(options, frame)
    if not (options.csv or options.json):
        table = waiting(frame)
        print(
            "\nwaiting for other ranks:\n" + align_columns(table, ["context", "batch", "layout", *table.columns[-3:]])
        )


def run_roofline(options):
    frame = roofline(selected_for_figure(options, "bandwidth figure"))
    write_outputs(options, frame, plots.roofline_panels(frame) if options.figure else None)


def run_model(options):
    points = selected_points(options)
    try:
        fit_ranks = [int(n) for n in options.fit_ranks.split(",")] if options.fit_ranks else None
    except ValueError:
        raise AnalysisError(
            f"--fit-ranks {options.fit_ranks}: not a list of numbers; write it as --fit-ranks 1,2"
        ) from None
    if not 1 <= options.up_to <= 1 << 20:
        raise AnalysisError(f"--up-to {options.up_to}: out of range; give 1 to {1 << 20}")
    network = network_from(options)
    memory = options.memory * 1e9 if options.memory is not None else None

    def tables(members):
        model = cost_model.fit(members, fit_ranks)
        checked = cost_model.check(model, members)
        predictions = extrapolate(model, members, options.up_to, network, memory)
        if not (options.csv or options.json):
            print_model(model, members, checked, predictions, network)
        held = cost_model.held_out(members)
        return pd.concat(
            [checked.assign(table="model"), held.assign(table="held out"), predictions.assign(table="predictions")]
        )

    if options.machine:
        write_machine(options.machine, machine_text(points, network, memory))
    points = with_stages(points)
    frame = tables_by_series(options, points, tables, "cost model")
    if options.figure:
        of = dict(list(frame.groupby("table")))
        held = of.get("held out", of["model"])
        unusable = cost_model.unusable(cost_model.cross_validate(points))
        save_figure(options, plots.check_panels(held) + plots.prediction_panels(of["predictions"], unusable))
    if options.csv or options.json:
        write_data(options, frame)


def print_model(model, points, checked, predictions, network):
    """The tables of one series on the terminal."""
    print(f"\n{series.title(points[0])}")
    step = checked[checked.stage == "step"]
    print(align_columns(step, ["context", "batch", "layout", "measured", "predicted", "error", "part"]))
    coefficients = model.coefficients()
    print(f"\nfitted to {', '.join(map(str, model.fit_ranks))} ranks")
    print(align_columns(coefficients, list(coefficients)))
    errors = cost_model.cross_validate(points)
    if len(errors):
        print("\neach layout predicted by a fit to the others\n" + align_columns(errors, list(errors)))
    print(f"\nPREDICTED where it was not measured. {cost_model.reliability(errors, points)}", end=" ")
    print(f"Network between nodes: {network.text()}")
    print(align_columns(predictions, PREDICTION_COLUMNS))


def run_kernels(options):
    frame = kernels(selected_points(options))
    if frame.empty:
        raise AnalysisError('no point of these files is of kind = "kernels"; run inputs/gate/m4_kernels.toml')
    write_outputs(options, frame, plots.kernel_panels(frame))


def run_gate(options):
    """The answer of `nsa gate` on these files together; of a folder, one for each pair of inputs."""
    if any(map(os.path.isdir, options.files)):
        answers = answers_of_folder(options)
    else:
        answers = [gate.call_gate(options.files, options.nsa)]
    frame = pd.concat([gate.gate_table(answer) for answer in answers], ignore_index=True)
    write_outputs(options, frame, plots.gate_panels(frame))
    if not (options.csv or options.json):
        for answer in answers:
            for row in gate.verdicts(answer).itertuples():
                of = f" [{', '.join(answer['given'])}]" if "given" in answer else ""
                print(f"\n{row.device}: {row.verdict} ({row.why}){of}")


def answers_of_folder(options):
    """Answers of `nsa gate` on all evidence below the folders, by gate.paired_files.

    Files that are no evidence, and refusals, are named on stderr.
    """
    files = find_files(options.files)
    csvs = [f for f in files if f.endswith(".csv")]
    points = [p for f in files if f not in csvs for p in read_file(f)]
    series.leave_out(points, gate.is_evidence, "no evidence for the gate")
    decisions = gate_decisions(points, csvs, options.nsa)
    for d in decisions:
        if d.answer is None:
            warnings.warn(f"not decided: {', '.join(d.files)}: {d.reason}", LeftOut, stacklevel=2)
    answers = [d.answer | {"given": d.files} for d in decisions if d.answer is not None]
    if not answers:
        raise AnalysisError(
            decisions[0].reason
            if decisions
            else "no evidence for the gate in these folders; run inputs/gate/m4_decode.toml and "
            "inputs/gate/m4_kernels.toml"
        )
    return answers


def fraction_of(text, option):
    """0.05 of "5%" or "0.05"; None of None. Raises AnalysisError that names the option."""
    if text is None:
        return None
    number = series.number_of(text.removesuffix("%"))
    value = None if number is None else number / 100 if text.endswith("%") else number
    if value is None or not 0 <= value < 10:
        raise AnalysisError(f"{option} {text}: not a fraction; write it as {option} 5%")
    return value


def run_compare(options):
    """Compares two sets of runs; exit code 1 where --fail-above finds a slower point."""
    a, b = (series.where(read(side), options.where) for side in options.files)
    fail_above = fraction_of(options.fail_above, "--fail-above")
    frame, only_a, only_b = compare(
        a,
        b,
        options.stages,
        options.paired,
        fraction_of(options.run_noise, "--run-noise"),
        fraction_of(options.same, "--same"),
        options.ignore or (),
    )
    for name, alone in zip(options.files, (only_a, only_b)):
        if alone:
            files = series.shown_paths(dict.fromkeys(p.run.path for p in alone))
            warnings.warn(f"{len(alone)} points are only in {name}: {', '.join(files)}", LeftOut, stacklevel=1)
    write_data(options, frame)
    if not (options.csv or options.json):
        head = sides(a, b)
        print(align_columns(head, list(head)))
        for name, rows in frame.groupby("series", sort=False):
            print(f"\n{name}\n" + align_columns(rows, shown_columns(rows, TERMINAL_COLUMNS["compare"])))
        counts = frame.verdict.value_counts()
        print("\nB over A: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    slower = frame[(frame.verdict == "SLOWER") & (frame.ratio > 1 + (fail_above or 0))]
    if fail_above is not None and len(slower):
        worst = slower.loc[slower.ratio.idxmax()]
        print(
            f"nsa-analysis: {len(slower)} of {len(frame)} are slower by more than {options.fail_above}; the worst is "
            f"{worst.stage} at context {series.format_count(worst.context)}, {worst.layout}: {worst.ratio:.3f} times",
            file=sys.stderr,
        )
        return 1


def run_export(options):
    """Writes the tidy table file by file, so that it need not fit into memory; Parquet at once."""
    points = selected_points(options)
    if options.format == "aiconfigurator":
        return export_to_aiconfigurator(options, points)
    chosen = options.statistics.split(",") if options.statistics else STATISTICS
    if unknown := [s for s in chosen if s not in STATISTICS]:
        raise AnalysisError(f"--statistics {unknown[0]}: no such statistic; there are {', '.join(STATISTICS)}")
    outputs = {options.output, options.csv, options.json} - {None}
    if len(outputs) > 1:
        raise AnalysisError("one output at a time: give -o, --csv or --json")
    path = outputs.pop() if outputs else "-"
    ending = ".jsonl" if options.json else ".csv" if options.csv or path == "-" else os.path.splitext(path)[1]
    if ending == ".parquet":
        return write_parquet(path, export.export(points, chosen))
    if ending not in (".csv", ".jsonl"):
        raise AnalysisError(f"-o {path}: unknown format; end the name in .csv, .parquet or .jsonl")
    with nullcontext(sys.stdout) if path == "-" else replacing(path) as file:
        if ending == ".csv":
            file.writelines(export.csv_lines(points, chosen))
        else:
            for part in export.frames(points, chosen):
                file.writelines(f"{line}\n" for line in export.json_lines(part))


def export_to_aiconfigurator(options, points):
    """Writes FAMILY/TABLE and FAMILY/collection_meta.yaml below the folder -o: Parquet, or text without pyarrow."""
    if not options.output or options.csv or options.json or options.statistics:
        raise AnalysisError("--format aiconfigurator writes a folder: give -o FOLDER, and no other output")
    families = aiconfigurator.tables(points)
    metas = {family: aiconfigurator.collection_meta(tables) for family, tables in families.items()}
    for family, tables in families.items():
        folder = os.path.join(options.output, family)
        os.makedirs(folder, exist_ok=True)
        for name, table in tables.items():
            path = os.path.join(folder, name)
            try:
                write_parquet(f"{path}.parquet", table)
            except AnalysisError:  # no pyarrow: the text that AIConfigurator's collector converts
                table.to_csv(f"{path}.txt", index=False, errors="replace")
                print(f"nsa-analysis: note: {path}.txt is text, as pyarrow is not installed", file=sys.stderr)
        write_text(os.path.join(folder, "collection_meta.yaml"), metas[family])


def run_report(options):
    text = make_report(options.files, options.nsa, options.title, network_from(options), report_options(options))
    write_text(options.output, text)
    print(f"{options.output}: {len(text) / 1e6:.1f} MB")


def report_options(options):
    """Words of the command line that make the same report again: those options that differ from their default."""
    default = cost_model.Network()
    words = ["-o", options.output]
    for name, usual in (
        ("title", "nsa report"),
        ("nsa", None),
        ("network", default.name),
        ("latency", default.latency * 1e6),
        ("link", default.bandwidth / 1e9),
        ("node", default.node),
    ):
        value = getattr(options, name)
        words += [] if value == usual else [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words
