"""The picture of a run: which matrices trained how much, where in their spectra, and what came of it.

Colour is used once: the hue says the location, its depth says the rank. The hues (Okabe and Ito's blue
and orange, Tol's wine) stay apart for colour-blind readers at every depth; the tests simulate that.

Shapes: T env steps · M matrices · R ranks · S locations.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator

from lelora_env.config import AdapterConfig
from lelora_env.export import write_atomically
from lelora_env.matrices import MATRIX_TYPES, MatrixInfo
from lelora_env.records import LaneTrace, RunRecord

HUES = {"primary": "#0072B2", "medium": "#E69F00", "minor": "#882255"}
EMPTY = "#F1F1F1"
"""Colour of rank 0: nothing trains."""
LINES = (("#111111", "-"), ("#8C8C8C", "-"), ("#8C8C8C", ":"), ("#111111", ":"), ("#111111", "--"), ("#8C8C8C", "--"))
"""Colour and dash of each lane's line in the lower panels: without hue, which says location only."""
CURVES = (("mean_rank", "mean rank"), ("L1", "reward-batch\nloss"), ("reward", "reward"))
"""Metrics drawn beneath the carpets, with their labels."""
GAP = 0.36
"""Inches between two panels."""
HEADER = 1.5
"""Inches above the first panel: the title and the key."""
MAX_COLUMNS = 200
"""Time is cut into at most this many columns; a column shows the mean rank and the usual location."""


def location_colours(names: Sequence[str], fractions: Sequence[float]) -> np.ndarray:
    """One RGB colour per location, (S, 3) in [0, 1].

    The three named locations have fixed hues; any other set is taken from the viridis scale by its
    place in the spectrum.
    """
    if all(name in HUES for name in names):
        return np.array([to_rgb(HUES[name]) for name in names])
    scale = matplotlib.colormaps["viridis"]
    return np.array([scale(0.1 + 0.8 * fraction)[:3] for fraction in fractions])


def depth(rank: np.ndarray, max_rank: float) -> np.ndarray:
    """How strongly a rank is coloured, in [0, 1]: 0 for rank 0, 1 for the largest, a jump between 0 and 1.

    Logarithmic, because rank sets usually double from one rank to the next.
    """
    share = np.log2(1 + np.asarray(rank, dtype=np.float64)) / np.log2(1 + max_rank)
    return np.where(share > 0, 0.2 + 0.8 * share, 0.0)


def allocation_rgb(ranks: np.ndarray, locations: np.ndarray, colours: np.ndarray, max_rank: float) -> np.ndarray:
    """Colour an allocation: (..., M) ranks and location indices -> (..., M, 3) in [0, 1]."""
    strength = depth(ranks, max_rank)[..., None]
    painted: np.ndarray = strength * colours[locations] + (1 - strength) * np.array(to_rgb(EMPTY))
    return painted


def binned(ranks: np.ndarray, locations: np.ndarray, num_locations: int,
           columns: int = MAX_COLUMNS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut time into at most ``columns`` pieces.

    Args:
        ranks: (T, M).
        locations: (T, M) indices.
        num_locations: S.
        columns: Largest number of pieces, N ≤ T.

    Returns:
        Edges in env steps (N + 1,); mean rank (N, M); usual location, weighted by rank (N, M).
    """
    steps = len(ranks)
    edges = np.unique(np.linspace(0, steps, min(columns, steps) + 1).round().astype(int))
    mean = np.stack([ranks[a:b].mean(0) for a, b in itertools.pairwise(edges)])
    weights = np.stack([(ranks + 1e-6) * (locations == s) for s in range(num_locations)], axis=-1)  # (T, M, S)
    usual = np.stack([weights[a:b].sum(0).argmax(-1) for a, b in itertools.pairwise(edges)])
    return edges, mean, usual


def draw_order(matrices: Sequence[MatrixInfo]) -> tuple[list[int], list[tuple[str, int, int]]]:
    """Rows of the picture: matrices by type, layers ascending within.

    Returns:
        Indices of the matrices from top to bottom; (type, first row, one past the last) of each band.
    """
    order = sorted(range(len(matrices)), key=lambda i: (MATRIX_TYPES.index(matrices[i].type), matrices[i].layer, i))
    bands: list[tuple[str, int, int]] = []
    for row, index in enumerate(order):
        kind = matrices[index].type
        if bands and bands[-1][0] == kind:
            bands[-1] = (kind, bands[-1][1], row + 1)
        else:
            bands.append((kind, row, row + 1))
    return order, bands


class _Style:
    """What the panels of one figure share."""

    def __init__(self, matrices: Sequence[MatrixInfo], rank_set: Sequence[int], names: Sequence[str],
                 fractions: Sequence[float]) -> None:
        self.matrices, self.rank_set, self.names = list(matrices), list(rank_set), list(names)
        self.colours = location_colours(names, fractions)
        self.order, self.bands = draw_order(matrices)

    def lane(self, left: Axes, right: Axes, trace: LaneTrace, height: float) -> None:
        """One lane: its carpet, and each matrix's mean rank at the right; ``height`` in inches."""
        self.carpet(left, trace)
        self.shares(right, trace)
        title = trace.name
        if _uniform(trace):
            title += f": rank {trace.ranks[0, 0]}, {self.names[trace.locations[0, 0]]}, in every matrix"
            left.set_yticks([])
            right.axis("off")
        else:
            self.label_rows(left, height)
        left.set_title(title, loc="left", fontsize=10)

    def carpet(self, axes: Axes, trace: LaneTrace) -> None:
        """Matrices over time: colour = (location, rank)."""
        edges, mean, usual = binned(trace.ranks[:, self.order], trace.locations[:, self.order], len(self.names))
        image = allocation_rgb(mean, usual, self.colours, max(self.rank_set)).transpose(1, 0, 2)  # (M, N, 3)
        rows = len(self.order)
        axes.pcolormesh(edges + 0.5, np.arange(rows + 1), image, edgecolors="none", rasterized=True)
        axes.set_ylim(rows, 0)
        axes.set_xlim(0, len(trace.ranks) + 0.5)  # as the curves beneath, which begin before the first step
        for _, first, _ in self.bands[1:] if not _uniform(trace) else ():
            axes.axhline(first, color="white", linewidth=2.5)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0, labelbottom=False)

    def label_rows(self, axes: Axes, height: float) -> None:
        """Layer numbers as ticks (as many as fit), types as band names; ``height`` in inches."""
        rows = len(self.order)
        every = max(1, int(np.ceil(0.13 * rows / height)))
        ticks = [row for _, first, last in self.bands for row in range(first, last) if (row - first) % every == 0
                 and (row == first or last - row >= every / 2)]
        axes.set_yticks([row + 0.5 for row in ticks], [str(self.matrices[self.order[row]].layer) for row in ticks],
                        fontsize=7, color="#444444")
        axes.annotate("layer", (0, 1), xycoords="axes fraction", xytext=(-4, 5), textcoords="offset points", ha="right",
                      fontsize=7, color="#444444")
        for kind, first, last in self.bands:
            upright = (last - first) / rows * height < 0.09 * len(kind)
            axes.text(-0.055, (first + last) / 2, kind, transform=axes.get_yaxis_transform(), ha="right" if upright
                      else "center", va="center", rotation=0 if upright else 90, fontsize=9, fontweight="bold")

    def shares(self, axes: Axes, trace: LaneTrace) -> None:
        """Mean rank of each matrix over the run as a bar, cut by location."""
        left = np.zeros(len(self.order))
        rows = np.arange(len(self.order)) + 0.5
        gap = 0.8 if len(self.order) <= 60 and not _uniform(trace) else 1.0
        for index, colour in enumerate(self.colours):
            part = (trace.ranks * (trace.locations == index)).mean(0)[self.order]
            axes.barh(rows, part, left=left, height=gap, color=colour, linewidth=0)
            left += part
        axes.set_ylim(len(self.order), 0)
        axes.set_xlim(0, max(self.rank_set))
        axes.tick_params(labelleft=False, left=False, labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)

    def key(self, axes: Axes) -> None:
        """The legend: one cell for each (location, rank)."""
        picked = np.linspace(0, len(self.rank_set) - 1, min(len(self.rank_set), 6)).round().astype(int)
        shown = np.array(self.rank_set)[picked]  # (up to 6,)
        places = np.repeat(np.arange(len(self.names))[:, None], len(shown), axis=1)  # (S, up to 6)
        axes.imshow(allocation_rgb(np.broadcast_to(shown, places.shape), places, self.colours, max(self.rank_set)),
                    aspect="auto")
        axes.set_xticks(range(len(shown)), [str(rank) for rank in shown], fontsize=8)
        axes.set_yticks(range(len(self.names)), self.names, fontsize=8)
        axes.set_title("location × rank", fontsize=9, loc="left", pad=4)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)


def _curve(axes: Axes, traces: Sequence[LaneTrace], key: str, label: str) -> None:
    for trace, (colour, dash) in zip(traces, itertools.cycle(LINES), strict=False):
        steps, values = trace.series(key)
        axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.4, label=trace.name)
    axes.set_ylabel(label, fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def allocation_figure(traces: Sequence[LaneTrace], matrices: Sequence[MatrixInfo], *, rank_set: Sequence[int],
                      locations: Sequence[str], fractions: Sequence[float], title: str) -> Figure:
    """Draw the allocation over time, a carpet per lane, with rank, loss and reward beneath.

    A lane with one rank and location throughout gets a strip: there is nothing more to see.

    Args:
        traces: The lanes, the agent's first; each with at least one env step.
        matrices: The M matrices, in the traces' order.
        rank_set: Ranks to choose from, ascending.
        locations: Names of the S locations.
        fractions: Their places in the spectrum, in [0, 1].
        title: Headline.
    """
    style = _Style(matrices, rank_set, locations, fractions)
    shown = [trace for trace in traces if len(trace.ranks)]
    heights = _heights(shown, len(matrices))
    rows = [*heights, *[1.05] * len(CURVES)]
    total = sum(rows) + GAP * (len(rows) - 1) + HEADER + 0.55  # inches
    figure = Figure(figsize=(11, total), facecolor="white")
    grid = GridSpec(len(rows), 2, figure=figure, height_ratios=rows, width_ratios=[4.6, 1], left=0.105, right=0.975,
                    top=1 - HEADER / total, bottom=0.55 / total, hspace=GAP * len(rows) / sum(rows), wspace=0.04)
    figure.text(0.105, 1 - 0.45 / total, title, va="top", fontsize=13, fontweight="bold")
    for row, (trace, height) in enumerate(zip(shown, heights, strict=True)):
        left, right = figure.add_subplot(grid[row, 0]), figure.add_subplot(grid[row, 1])
        style.lane(left, right, trace, height)
        if row == 0:
            right.set_title("mean rank over the run", loc="left", fontsize=9)
    side = figure.add_subplot(grid[len(shown), 1])
    side.axis("off")
    side.legend(handles=_curves(figure, grid, shown), loc="upper left", frameon=False, fontsize=9, borderaxespad=0.2)
    style.key(figure.add_axes((0.865, 1 - 0.95 / total, 0.11, 0.55 / total)))
    return figure


def _heights(traces: Sequence[LaneTrace], matrices: int) -> list[float]:
    """Inches for each lane's carpet: the first is the largest, one that never changes is a strip."""
    tall = float(np.clip(0.2 * matrices, 1.2, 6.5))
    return [0.22 if _uniform(t) else tall if t is traces[0] else max(1.2, 0.55 * tall) for t in traces]


def _uniform(trace: LaneTrace) -> bool:
    """The same rank and location in every matrix and at every step."""
    return len(np.unique(trace.ranks)) == 1 and len(np.unique(trace.locations)) == 1


def _curves(figure: Figure, grid: GridSpec, traces: Sequence[LaneTrace]) -> list[Any]:
    """The panels beneath the carpets; returns the legend's handles."""
    first = len(traces)
    panels = [figure.add_subplot(grid[first + i, 0]) for i in range(len(CURVES))]
    for axes, (key, label) in zip(panels, CURVES, strict=True):
        _curve(axes, traces, key, label)
        axes.set_xlim(0, max(len(trace.ranks) for trace in traces) + 0.5)  # losses begin before the first step
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.tick_params(labelbottom=axes is panels[-1])
    panels[0].set_ylim(bottom=0)
    panels[-1].set_xlabel("env step", fontsize=9)
    return list(panels[0].get_legend_handles_labels()[0])


def draw_run(run: RunRecord, path: Path | None = None) -> Figure:
    """Draw a run folder's picture and save it in the folder.

    Args:
        run: The run, finished or not.
        path: Where to save it; ``None`` = ``allocation.png`` in the run folder. The ending decides
            the format (png, svg, pdf).
    """
    adapter = AdapterConfig(rank_set=tuple(run.config["rank_set"]), locations=tuple(run.config["locations"]))
    figure = allocation_figure(run.lanes, run.matrices, rank_set=adapter.rank_set, locations=adapter.location_names,
                               fractions=adapter.location_fractions, title=_title(run))
    target = path or run.path / "allocation.png"
    write_atomically(target, lambda path: figure.savefig(path, format=target.suffix[1:], dpi=130))
    return figure


def _title(run: RunRecord) -> str:
    names = [str(run.config[key]).rstrip("/").rpartition("/")[2] for key in ("task", "model") if run.config.get(key)]
    facts = [*(name if len(name) <= 28 else name[:27] + "…" for name in names), f"seed {run.info['seed']}"]
    if run.status in ("interrupted", "failed"):
        facts.append(run.status)
    return "What trained when:  " + " · ".join(facts)
