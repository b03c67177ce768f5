"""The picture: colours that can be told apart, data in the right places, text that does not collide."""

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lelora_env.matrices import MatrixInfo
from lelora_env.plots import allocation_figure, allocation_rgb, binned, depth, draw_order, draw_run, location_colours
from lelora_env.records import LaneTrace, RunRecord
from lelora_env.runs import RunFolder

Array = npt.NDArray[np.float64]
LOCATIONS = ("primary", "medium", "minor")
FRACTIONS = (0.0, 0.5, 1.0)

# Machado, Oliveira, Fernandes (2009), severity 1, for linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen_as_lab(rgb: Array, vision: str) -> Array:
    """CIE L*a*b* of an sRGB colour as a reader with that vision sees it."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(VISION[vision]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])
    xyz = to_xyz @ linear / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", list(VISION))
@pytest.mark.parametrize("ranks", [(2, 4, 8), (2, 4, 8, 16, 32, 64, 128)])
def test_locations_differ_for_every_reader_at_every_rank(vision: str, ranks: tuple[int, ...]) -> None:
    colours = location_colours(LOCATIONS, FRACTIONS)
    cells = {(s, r): seen_as_lab(allocation_rgb(np.array(r), np.array(s), colours, ranks[-1]), vision)
             for s in range(3) for r in ranks}
    empty = seen_as_lab(allocation_rgb(np.array(0), np.array(0), colours, ranks[-1]), vision)
    for (one, lab), (two, other) in itertools.combinations(cells.items(), 2):
        if one[0] != two[0]:  # a just noticeable difference is about 2.3
            assert np.linalg.norm(lab - other) > 8, (one, two)
    assert all(np.linalg.norm(lab - empty) > 8 for lab in cells.values())


def test_depth_grows_with_rank_and_rank_zero_has_none() -> None:
    values = depth(np.array([0, 1, 2, 4, 8, 16, 32, 64]), 64)
    assert values[0] == 0
    assert values[-1] == 1
    assert (np.diff(values) > 0.05).all()
    colours = location_colours(LOCATIONS, FRACTIONS)
    assert len(np.unique(allocation_rgb(np.zeros(3), np.arange(3), colours, 8), axis=0)) == 1


def test_other_location_sets_get_distinct_colours() -> None:
    colours = location_colours(("at_0.1", "at_0.5", "at_0.9"), (0.1, 0.5, 0.9))
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(colours, 2)) > 0.2


def test_binning_by_hand() -> None:
    ranks = np.array([[2, 0], [4, 0], [0, 8], [8, 8]])
    locations = np.array([[0, 1], [2, 1], [0, 2], [1, 2]])
    edges, mean, usual = binned(ranks, locations, 3, columns=2)
    np.testing.assert_array_equal(edges, [0, 2, 4])
    np.testing.assert_array_equal(mean, [[3, 0], [4, 8]])
    # 4 ranks at location 2 outweigh 2 at location 0; at rank 0 the location that was named counts.
    np.testing.assert_array_equal(usual, [[2, 1], [1, 2]])


def test_short_runs_are_not_binned() -> None:
    ranks, locations = np.arange(10).reshape(5, 2), np.zeros((5, 2), dtype=int)
    edges, mean, _ = binned(ranks, locations, 1)
    np.testing.assert_array_equal(edges, np.arange(6))
    np.testing.assert_array_equal(mean, ranks)


def matrices(layers: int, types: tuple[str, ...]) -> list[MatrixInfo]:
    return [MatrixInfo(f"{i}.{t}", i, t, 64, 64, False, True) for i in range(layers) for t in types]


def test_rows_are_grouped_by_type_then_layer() -> None:
    order, bands = draw_order(matrices(3, ("value", "query")))
    assert order == [1, 3, 5, 0, 2, 4]  # query comes first in the vocabulary
    assert bands == [("query", 0, 3), ("value", 3, 6)]


def trace(name: str, steps: int, count: int, rank_set: tuple[int, ...], *, fixed: bool = False) -> LaneTrace:
    rng = np.random.default_rng(0)
    ranks = np.array(rank_set)[rng.integers(0, len(rank_set), (steps, count))]
    places = rng.integers(0, 3, (steps, count))
    if fixed:
        ranks, places = np.full_like(ranks, rank_set[-1]), np.zeros_like(places)
    lines = [{"env_step": t + 1, "L1": 1.0 / (t + 1), "reward": -1.0, "mean_rank": float(ranks[t].mean())}
             for t in range(steps)]
    return LaneTrace(name, ranks, places, [{"env_step": 0, "L1": 2.0}, *lines])


def figure_of(layers: int, types: tuple[str, ...], steps: int, rank_set: tuple[int, ...]) -> Figure:
    count = layers * len(types)
    lanes = [trace("reinforce", steps, count, rank_set), trace("fixed", steps, count, rank_set, fixed=True),
             trace("random", steps, count, rank_set)]
    return allocation_figure(lanes, matrices(layers, types), rank_set=rank_set, locations=LOCATIONS,
                             fractions=FRACTIONS, title="What trained when:  docstrings · minilm · seed 0")


@pytest.mark.parametrize(("layers", "types", "steps", "rank_set"), [
    (6, ("query", "value"), 100, (0, 2, 4, 8)),
    (32, ("query", "key", "value", "up", "down"), 1000, (0, 2, 4, 8, 16, 32, 64)),
    (1, ("gate_up",), 1, (0, 1)),
    (12, ("query", "key", "value", "output", "up", "down"), 3, (4, 128)),
])
def test_no_text_overlaps_or_leaves_the_picture(layers: int, types: tuple[str, ...], steps: int,
                                                rank_set: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(layers, types, steps, rank_set)
    boxes: list[tuple[str, Any]] = []
    draw = Text.draw

    def noted(self: Text, renderer: Any, *args: Any) -> None:  # ticks outside an axis exist, but are never drawn
        if self.get_visible() and self.get_text().strip():
            boxes.append((self.get_text(), self.get_window_extent(renderer)))
        draw(self, renderer, *args)

    monkeypatch.setattr(Text, "draw", noted)
    FigureCanvasAgg(figure).draw()
    assert len(boxes) > 20
    page = figure.bbox
    for text, box in boxes:
        assert page.x0 <= box.x0, text
        assert box.x1 <= page.x1, text
        assert page.y0 <= box.y0, text
        assert box.y1 <= page.y1, text
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 0.5 or min(a.y1, b.y1) - max(a.y0, b.y0) < 0.5, (one, two)


def test_curves_show_the_logged_numbers() -> None:
    figure = figure_of(2, ("query", "value"), 5, (0, 8))
    loss: Any = next(axes for axes in figure.axes if axes.get_ylabel() == "reward-batch\nloss")
    assert len(loss.lines) == 3
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), range(6))
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [2, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 3


def test_bars_are_mean_ranks_by_location() -> None:
    lane = LaneTrace("a", np.array([[2, 0], [4, 8]]), np.array([[0, 1], [2, 1]]), [])
    figure = allocation_figure([lane], matrices(2, ("query",)), rank_set=(0, 2, 4, 8), locations=LOCATIONS,
                               fractions=FRACTIONS, title="t")
    bars: Any = next(axes for axes in figure.axes if axes.get_title(loc="left") == "mean rank over the run")
    widths = np.array([bar.get_width() for bar in bars.patches]).reshape(3, 2)  # (S, M)
    np.testing.assert_allclose(widths, [[1, 0], [0, 4], [2, 0]])


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_run_folder_is_drawn(tmp_path: Path, ending: str) -> None:
    rows = matrices(2, ("query", "value"))
    config = {"rank_set": [0, 2, 4], "locations": ["primary", 0.25], "model": "/some/where/model", "task": "t"}
    with RunFolder(tmp_path / "run", config=config, matrices=rows, lanes=["agent"], seed=0) as folder:
        for step in range(1, 4):
            folder.log_action("agent", step, np.array([0, 0, 1, 1, 2, 0, 2, 1]))
            folder.log("agent", step, {"L1": 1.0, "reward": -1.0, "mean_rank": 2.5})
    target = tmp_path / f"picture.{ending}" if ending == "svg" else None
    draw_run(RunRecord(tmp_path / "run"), target)
    data = (target or tmp_path / "run" / "allocation.png").read_bytes()
    if ending == "png":
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 1000
        assert height > 500
    else:
        assert b"<svg" in data[:1000]
    assert not list(tmp_path.rglob(".*"))
