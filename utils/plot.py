"""Learning curves of run directories, averaged over seeds, in a figure fit for a paper.

    python -m utils.plot data/ppo data/trpo --smooth 11 --out curves.png      # data/ppo_Hopper-v4, data/ppo_Walker2d-v4, ...
    python -m utils.plot data --select Hopper --value Performance KL --band ci --out curves.pdf

    fig = plot(load_runs(["data"], exclude=["old"]), smooth=11)    # a matplotlib Figure; a notebook shows it after
    save(fig, "curves.pdf")                                        # `%matplotlib inline`

Runs of one name whose configurations differ only in the seed are one curve. Each environment has a panel of its own; several
values are rows of panels. Seeds whose rows differ are interpolated linearly onto all their steps, and a curve begins and ends
where all its seeds have data. `Performance` is a run's AverageTestEpRet if it has such numbers, else its AverageEpRet.
"""

import itertools
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.backends import BackendFilter, backend_registry
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tyro.conf import Positional, arg

from utils.process import RunError, one_line
from utils.runs import group_runs, load_runs, one_per_seed

AXIS_LABELS = dict(TotalEnvInteracts="Environment steps", Time="Time (s)", Performance="Average return")
COLORS = [matplotlib.color_sequences["okabe_ito"][i] for i in (5, 6, 3, 7, 1, 2, 0)]  # without its yellow, too pale for lines
LOOKS = [dict(color=color, linestyle=dashes) for dashes in ("-", "--", ":", "-.") for color in COLORS]
STYLE = {"font.size": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.title_fontsize": 6.5}
STYLE |= {"axes.grid": True, "grid.color": "0.88", "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.linewidth": 0.6}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.xmargin": 0}
STYLE |= {"lines.linewidth": 1, "text.usetex": False, "text.parse_math": False, "pdf.fonttype": 42, "savefig.dpi": 300}


@dataclass
class Args:
    logdirs: Positional[tuple[Path, ...]] = (Path("data"),)  # directories to search for runs; prefixes are completed
    legend: Annotated[tuple[str, ...], arg(aliases=["-l"])] = ()  # names of the curves, one for each directory completed
    xaxis: Annotated[str, arg(aliases=["-x"])] = "TotalEnvInteracts"  # column on the x-axis: TotalEnvInteracts, Epoch, Time
    value: Annotated[tuple[str, ...], arg(aliases=["-y"])] = ("Performance",)  # columns on the y-axis, each a row of panels
    count: bool = False  # draw each run on its own instead of averaging over seeds
    smooth: Annotated[int, arg(aliases=["-s"])] = 1  # width of the averaging window, in rows
    select: tuple[str, ...] = ()  # show only runs whose path contains all of these
    exclude: tuple[str, ...] = ()  # show only runs whose path contains none of these
    est: Literal["mean", "median", "max", "min"] = "mean"  # what the line is, over seeds
    band: Literal["std", "ci"] = "std"  # standard deviation over seeds, or the bootstrapped 95% interval of the line
    out: Path | None = None  # figure to write, .png, .svg or .pdf; a window opens if not given


def curve(run, xaxis, value, smooth=1):
    """A Series of `value` by `xaxis` without blanks, each number the mean of those in the `smooth` rows around it; empty, with
    a line on stderr, if the run has no such curve."""
    rows = run.rows.reindex(columns=list({xaxis, value}))
    y = rows[value].rolling(smooth, min_periods=1, center=True).mean().set_axis(rows[xaxis])
    y = y[y.index.notna()].dropna().rename(run.dir)
    if y.empty or (np.diff(y.index) <= 0).any():
        reason = f"it has no numbers in {value}" if y.empty else f"its {xaxis} does not increase from row to row"
        print(f"left out, {reason}: {run.dir}", file=sys.stderr)
        return y[:0]
    return y


def average(curves, est="mean", band="std"):
    """Arrays x, line, low, high (n,) of several seeds' curves, at all their x in the range that they share; stderr names a run
    that cuts the others short. The standard deviation is that of these seeds, with a division by their number."""
    table = pd.concat(curves, axis=1).sort_index().interpolate("index", limit_area="inside").dropna()
    ends = {y.index[-1]: y.name for y in curves}
    if table.empty:
        print(f"left out with its other seeds, some begin after its end: {ends[min(ends)]}", file=sys.stderr)
    elif min(ends) < 0.95 * max(ends):
        print(f"curve cut at {min(ends):,.0f} of {max(ends):,.0f}, where this run ends: {ends[min(ends)]}", file=sys.stderr)
    y, estimate, rng = table.to_numpy().T, getattr(np, est), np.random.default_rng(0)  # (seeds, n); the same figure every time
    line, std = estimate(y, axis=0), y.std(axis=0)
    if band == "std":
        return table.index, line, line - std, line + std
    resampled = [estimate(y[rng.integers(len(y), size=len(y))], axis=0) for _ in range(1000)]
    return table.index, line, *np.percentile(resampled, [2.5, 97.5], axis=0)


def plot(runs, value=("Performance",), xaxis="TotalEnvInteracts", smooth=1, est="mean", band="std", count=False):
    """Draw the learning curves of `runs`, a list of Run: a panel for each environment, a row of them for each value.

    The arguments are those of the command line. Returns a matplotlib Figure (unknown to pyplot). Raises RunError for a
    column that no run has, and if there is nothing to draw; a run without a curve is left out, with a line on stderr.
    """
    if smooth < 1 or not value:
        raise RunError(f"--smooth {smooth}: has to be at least 1" if value else "--value: name a column")
    there = sorted(set().union(*(run.rows for run in runs)))
    for flag, name in [("xaxis", xaxis), *(("value", name) for name in value)]:
        if name not in there:
            raise RunError(f"--{flag} {name}: no run has this column; there are {', '.join(there)}")

    lines = [(*key, one_per_seed(members)) for key, members in group_runs(runs).items() if not count]
    if count:
        lines = [(*key, [run]) for key, members in group_runs(runs).items() for run in members]
        named = [(env_id, f"{label} {re.split('_(?=s[0-9])', run.dir.name)[-1]}", [run]) for env_id, label, [run] in lines]
        lines = named if len({label for _, label, _ in named}) <= len(LOOKS) else lines  # no more can be told apart
    looks = dict(zip(dict.fromkeys(label for _, label, _ in lines), itertools.cycle(LOOKS), strict=False))

    env_ids = list(dict.fromkeys(run.env_id for run in runs))
    panels = list(itertools.product(value, env_ids))
    wrapped = math.ceil(len(env_ids) / math.ceil(len(env_ids) / 3))  # in rows of at most 3, as full as can be
    columns = wrapped if len(value) == 1 else len(env_ids)
    handles, sizes = {}, set()  # by label; numbers of seeds
    with matplotlib.rc_context(STYLE):
        fig = Figure(layout="constrained")
        axes = fig.subplots(math.ceil(len(panels) / columns), columns, squeeze=False)
        for k, (ax, (name, env_id)) in enumerate(zip(axes.flat, panels, strict=False)):
            for _, label, members in (line for line in lines if line[0] == env_id):
                curves = [y for y in (curve(run, xaxis, name, smooth) for run in members) if len(y)]
                x, line, low, high = average(curves, est, band) if curves else [()] * 4
                if len(x):
                    marker = dict(marker="o", markersize=3) if len(x) == 1 else {}
                    handles[label] = ax.plot(x, line, **looks[label], **marker)[0]
                    if len(curves) > 1:
                        ax.fill_between(x, low, high, color=looks[label]["color"], alpha=0.2, linewidth=0, zorder=1.5)
                    sizes.add(len(curves))
            ax.set(title=env_id, xlim=(0, None), ylabel=AXIS_LABELS.get(name, name) if k % columns == 0 else "")
            ax.set_xlabel(AXIS_LABELS.get(xaxis, xaxis) if k + columns >= len(panels) else "")
            ax.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10], integer=True)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        for ax in axes.flat:
            if not ax.lines:
                ax.set_axis_off()
        if not handles:
            raise RunError(f"nothing to draw: no run has a curve of {' or '.join(value)} over {xaxis}")
        seeds = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
        bands = dict(std="standard deviation", ci=f"bootstrapped 95% interval of the {est}")
        caption = "single runs" if count else f"{est} over {seeds} seeds, band: {bands[band]}" if max(sizes) > 1 else "1 seed"
        caption += f"; smoothed over {smooth} epochs" if smooth > 1 else ""
        if "Performance" in value and len({"AverageTestEpRet" in run.rows.dropna(axis=1, how="all") for run in runs}) > 1:
            caption += "; test return where there is one, else training return"
        fig.align_ylabels()
        _add_legend(fig, axes, handles, caption.capitalize())
    return fig


def _add_legend(fig, axes, handles, caption):
    """The legend and the caption below all panels, where they hide nothing; sets the size of the figure."""
    rows, columns = axes.shape
    width = 3.5 if columns == 1 else max(7, 2.3 * columns)  # inches: a column of a paper, or its page
    fig.set_size_inches(width, 4)
    letters = int(13 * width)  # about 13 to an inch
    names = [textwrap.fill(label, letters) for label in handles]
    lines = math.ceil(len(names) / max(1, letters // (4 + max(map(len, names)))))
    across = math.ceil(len(names) / lines)
    if "\n".join(names).count("\n") / across > 30:  # taller than its panels
        names, caption = [], f"{caption}; {len(names)} curves, too many to name"
    options = dict(title=textwrap.fill(caption, int(17 * width)), frameon=False, borderpad=0, handlelength=1.6)
    legend = fig.legend(list(handles.values())[: len(names)], names, loc="outside lower center", ncols=across, **options)
    legend.get_title().set_multialignment("center")
    fig.set_size_inches(width, rows * (2.4 if columns < 3 else 1.9) + legend.get_window_extent().height / fig.dpi)


def save(fig, out):
    """Write a figure of `plot` to a .png, .svg or .pdf file, fit for print. Raises RunError if it cannot be written."""
    try:
        with matplotlib.rc_context(STYLE):
            fig.savefig(out)
    except (OSError, ValueError) as error:
        raise RunError(f"--out {out}: cannot be written: {one_line(error)}") from None


def _show(fig):
    """Open a window and wait until it is closed."""
    from matplotlib import pyplot  # only here, as it looks for a display

    try:
        pyplot.switch_backend(pyplot.get_backend())
    except ImportError:  # a backend that MPLBACKEND names, but cannot be had here
        pyplot.switch_backend("agg")
    if pyplot.get_backend().lower() not in backend_registry.list_builtin(BackendFilter.INTERACTIVE):
        raise RunError("there is no display to open a window on; write the figure to a file, with --out curves.png")
    fig.set_dpi(200)
    pyplot.figure(fig)
    pyplot.show()


def main(args):
    runs = load_runs(args.logdirs, args.select, args.exclude, args.legend)
    fig = plot(runs, args.value, args.xaxis, args.smooth, args.est, args.band, args.count)
    save(fig, args.out) if args.out else _show(fig)


if __name__ == "__main__":
    main(tyro.cli(Args))
