"""The cost model: modelled bytes equal those of the program, coefficients are recovered, predictions by hand."""

import dataclasses
import pathlib
import types

import nsa_analysis
import numpy as np
import pytest
import synthetic
from nsa_analysis.data.reading import STAGES
from nsa_analysis.errors import AnalysisError
from nsa_analysis.models import cost_model, traffic

ROOT = pathlib.Path(__file__).resolve().parents[3]
NETWORK = nsa_analysis.Network("a network", latency=10e-6, bandwidth=1e9, node=4)


DECODE_FILES = sorted((ROOT / "docs/results/h200").glob("scaling_gpu_decode_r*.h5"))


@pytest.mark.parametrize("file", DECODE_FILES, ids=lambda f: f.stem)
def test_bytes_are_those_the_program_stored(file):
    for point in nsa_analysis.read(file):
        assert traffic.modelled_bytes(traffic.shape_of(point)) == dict(zip(STAGES, point.bytes[:, 0].tolist()))


def linear_sweep(folder, layouts=((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 1), (2, 4))):
    """Stages of 3 us + bytes at 1 TB/s, exchanges of 4 us + 2 us per hop, a step that saves 2 us per stage and overlaps
    half of its exchanges."""
    paths = []
    for heads, kv in layouts:
        points = []
        for context in (65536, 1048576):
            parameters = synthetic.PARAMETERS | {"run.context": context, "heads": heads, "kv": kv}
            shape = traffic.shape_of(types.SimpleNamespace(kind="decode", parameters=parameters))
            moved = traffic.modelled_bytes(shape)
            stages = {
                s: 3e-6 + moved[s] / 1e12
                for s in ("append", "compress", "attend_cmp", "rank", "attend_sel", "attend_win", "combine")
            }
            own, saved = sum(stages.values()), 2e-6 * len(stages)
            comm = sum(4e-6 + 2e-6 * (e.ranks - 1) for e in traffic.exchanges(shape))
            if comm:
                stages["comm"] = comm
            points.append(
                synthetic.point(
                    synthetic.times(heads * kv, 9, own - saved + comm / 2, **stages), heads, kv, run_context=context
                )
            )
        paths.append(str(synthetic.write(folder / f"h{heads}k{kv}.h5", points)))
    return paths


@pytest.fixture(scope="module")
def linear_points(tmp_path_factory):
    """Points of linear_sweep on all its layouts."""
    return nsa_analysis.read(linear_sweep(tmp_path_factory.mktemp("linear")))


def test_coefficients_are_recovered(linear_points):
    model = nsa_analysis.fit(linear_points)
    assert model.fit_ranks == (1, 2, 4)
    assert model.comm[:2] == pytest.approx((4e-6, 2e-6), rel=1e-6) and model.comm[2] == pytest.approx(0, abs=1e-16)
    assert model.exposed == pytest.approx(0.5, abs=0.02) and model.saved == pytest.approx(2e-6, rel=0.02)
    checked = nsa_analysis.check(model, linear_points)
    assert checked.error.abs().max() < 0.01
    assert set(checked[checked.part == "held out"].ranks) == {8}


def test_error_is_measured_against_predicted(linear_points):
    model = dataclasses.replace(nsa_analysis.fit(linear_points), comm=(8e-6, 4e-6, 0.0))
    comm = nsa_analysis.check(model, linear_points).query("stage == 'comm'")
    assert comm.error.tolist() == pytest.approx([1.0] * len(comm))


def test_an_exchange_beyond_a_node_by_hand():
    model = cost_model.CostModel({}, (4e-6, 2e-6, 1e-9), 1.0, 0.0, (1,))
    shape = traffic.Shape(
        "decode", 65536, 1, 65567, 256, 8, 4, 64, 64, 1, 2, False, True, 32, 16, 64, 16, 512, 0, 1024, 1, 16
    )
    gather = traffic.Exchange("lse", "all_gather", 16, 1000)
    # 4 us, 3 hops in the node, 15 kB received; 2 doublings to 4 nodes, 12 kB from others over 4 links.
    assert model.exchange_time(gather, shape, NETWORK) == pytest.approx(
        4e-6 + 3 * 2e-6 + 15000e-9 + 2 * 10e-6 + 12000 / 4 / 1e9
    )
    heads = traffic.Exchange("heads", "all_reduce", 4, 1000)
    # Head shards are 16 ranks apart: each in a node of its own, 2 doublings and 3/4 of 1 kB, in both passes.
    assert model.exchange_time(heads, shape, NETWORK) == pytest.approx(4e-6 + 1500e-9 + 4 * 10e-6 + 1500 / 1e9)


def test_predictions_have_a_table_of_their_own(linear_points):
    model = nsa_analysis.fit(linear_points)
    predictions = nsa_analysis.extrapolate(model, linear_points, 1024, NETWORK)
    assert not {"measured", "error"} & set(predictions)
    assert predictions[predictions.context == 1048576].ranks.tolist() == [1 << i for i in range(11)]
    assert predictions[predictions.ranks <= 4].network.eq("").all()
    assert predictions[predictions.ranks > 4].network.str.contains("a network.*assumed").all()
    assert predictions[predictions.context == 65536].ranks.max() == 256  # at most 64 chunks x 4 head shards
    one = predictions[(predictions.ranks == 1) & (predictions.context == 65536)].iloc[0]
    assert one.time == pytest.approx(model.predict(traffic.shape_of(linear_points[0], 1, 1))["step"])


def test_invalid_points_are_not_fitted(tmp_path):
    paths = linear_sweep(tmp_path)
    synthetic.write(tmp_path / "h2k4.h5", [synthetic.point(synthetic.times(8, 9, 5.0, append=5.0), 2, 4, valid=False)])
    model = nsa_analysis.fit(nsa_analysis.read(paths))
    assert model.fit_ranks == (1, 2) or model.fit_ranks == (1, 4)
    assert nsa_analysis.check(model, nsa_analysis.read(paths)).measured.max() < 1


def test_nothing_to_fit_is_an_error(linear_points):
    with pytest.raises(AnalysisError, match="no VALID point .* on 64 ranks"):
        nsa_analysis.fit(linear_points, [64])


def test_non_negative_fit():
    columns = np.array([[1.0, 2], [1, 4], [1, 8]])
    assert cost_model.non_negative_fit(columns, columns @ [3, 0.5]) == pytest.approx([3, 0.5])
    assert cost_model.non_negative_fit(columns, np.array([4.0, 2, 1]))[1] == 0  # falling times: no negative rate


def test_each_rank_count_is_predicted_by_the_others(linear_points):
    errors = cost_model.cross_validate(linear_points).set_index("ranks")
    assert errors.position.to_dict() == {2: "between", 4: "between", 8: "beyond"}
    assert errors.points.to_dict() == {2: 4, 4: 6, 8: 2} and errors.error.max() < 0.01
    text = cost_model.reliability(errors.reset_index(), linear_points)
    assert "Fitted without 8 ranks, the model is up to 0% off there." in text


def test_the_error_beyond_the_fit_is_of_a_rank_count_that_was_not_fitted(tmp_path):
    """On 4 ranks a step takes twice as long as the model of 1 and 2 ranks predicts: the error there is 50%."""
    layouts = ((1, 1), (2, 1), (4, 1))
    paths = linear_sweep(tmp_path, layouts)
    points = nsa_analysis.read(paths[:2])
    model = nsa_analysis.fit(points, [1, 2])
    slow = []
    for context in (65536, 1048576):
        shape = dataclasses.replace(traffic.shape_of(points[0]), heads=4, context=context, last=context + 31)
        table = synthetic.times(4, 9, 2 * model.predict(shape)["step"], append=3e-6)
        slow.append(synthetic.point(table, 4, run_context=context))
    points = nsa_analysis.read([*paths[:2], synthetic.write(tmp_path / "h4k1.h5", slow)])
    errors = cost_model.cross_validate(points).set_index("ranks")
    assert errors.error[4] == pytest.approx(0.5, abs=1e-6) and errors.position[4] == "beyond"
    assert "50% off there: too far to rely on." in cost_model.reliability(errors.reset_index(), points)


def test_layouts_whose_exchanges_were_not_timed_are_not_predicted(tmp_path):
    """Head shards alone exchange nothing; exchanges that cost nothing would make kv shards look ideal."""
    points = nsa_analysis.read(linear_sweep(tmp_path, ((1, 1), (2, 1))))
    model = nsa_analysis.fit(points)
    predictions = nsa_analysis.extrapolate(model, points, 1024, NETWORK)
    assert predictions[predictions.context == 65536].layout.tolist() == ["1x1", "2x1", "4x1"]  # 4 groups
    assert "only layouts without exchanges" in cost_model.reliability(cost_model.cross_validate(points), points)


def test_two_rank_counts_are_checked_where_nothing_is_exchanged(tmp_path):
    points = nsa_analysis.read(linear_sweep(tmp_path, ((1, 1), (2, 1), (1, 2))))
    assert nsa_analysis.fit(points).fit_ranks == (1, 2)
    errors = cost_model.cross_validate(points)
    assert errors[["ranks", "position", "points"]].values.tolist() == [[2, "beyond", 2]]
    assert "equally many ranks" in cost_model.reliability(errors, points)
    none = cost_model.cross_validate(nsa_analysis.read(linear_sweep(tmp_path, ((1, 1), (1, 2)))[:2]))
    assert none.empty and "unknown" in cost_model.reliability(none, points)
