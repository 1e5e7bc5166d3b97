"""Time of a step by stage, and reads by branch."""

import pandas as pd

from ..data.series import keep_latest, leave_out, one_series
from ..data.tables import identity_row, reads_per_query, stage_medians, stages_table
from ..errors import AnalysisError

# stage -> part, the unit of stacked bars. Parts are the columns of the program's table, with the projections apart.
PARTS = {
    "attend_cmp": "cmp",
    "rank": "rank",
    "attend_sel": "sel",
    "attend_win": "win",
    "comm": "comm",
    "project": "project, output",
    "output": "project, output",
    "append": "other",
    "compress": "other",
    "combine": "other",
}
OF_A_POINT = ("file", "point", "kind", "context", "batch", "forced", "ranks", "layout", "validity")
PART_ORDER = ("cmp", "rank", "sel", "win", "comm", "project, output", "other")


def with_stages(points):
    """The points that have stages of mode `branches`; a warning names the others. AnalysisError where none has."""
    points = leave_out(points, stage_medians, "without stages of mode `branches`")
    if not points:
        raise AnalysisError('no point has stages of mode `branches`; run with run.modes = ["branches", "total"]')
    return points


def branches(points):
    """DataFrame, one row per (point, stage) of mode `branches`.

    Columns: statistics of the slowest rank in s, share of the sum of all stages, and `part`, the group in figures. The
    sum can exceed `step`, because stages that are timed separately do not overlap.
    """
    points = with_stages(points)
    points = keep_latest(one_series(points, "chart of stages"))
    frame = stages_table(points, modes=("branches",))
    frame = frame[frame.stage != "step"].copy()
    frame["part"] = frame.stage.map(PARTS)
    return frame.reset_index(drop=True)


def reads(points):
    """DataFrame, one row per (point, branch): tokens read by one query of one sequence and group at the last step.

    Columns `counted` and `expected`; branch `all` also has `nsa_vibe`, nsa-vibe's formula.
    """
    rows = []
    for p in leave_out(points, lambda p: p.reads, "without reads"):
        row = identity_row(p) | reads_per_query(p)
        point = {name: row[name] for name in OF_A_POINT}
        for branch in ("cmp", "sel", "win"):
            rows.append(
                point
                | {
                    "branch": branch,
                    "counted": row[f"reads_{branch}_counted"],
                    "expected": row[f"reads_{branch}_expected"],
                }
            )
        rows.append(
            point
            | {
                "branch": "all",
                "counted": row["reads_counted"],
                "expected": row["reads_expected"],
                "nsa_vibe": row["reads_nsa_vibe"],
            }
        )
    return pd.DataFrame(rows)
