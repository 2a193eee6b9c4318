"""Learning curves of run directories, averaged over seeds, in a figure fit for a paper.

    python -m utils.plot data/ppo data/trpo --smooth 11 --out curves.png      # data/ppo_Hopper-v4, data/ppo_Walker2d-v4, ...
    python -m utils.plot data --select Hopper --value Performance KL --band ci --out curves.pdf

    fig = plot(load_runs(["data"], exclude=["old"]), smooth=11)    # a matplotlib Figure; a notebook shows it after
    save(fig, "curves.pdf")                                        # `%matplotlib inline`

Runs of one name whose configurations differ only in the seed are one curve, wherever they lie. Each environment has a panel
of its own, as the returns of two environments share no scale; several values are rows of panels. Seeds whose rows differ
are interpolated linearly onto all their steps. A curve begins and ends where all its seeds have data, so that it never
jumps because one of them ends. `Performance` is a run's AverageTestEpRet if it has such numbers, else its AverageEpRet.
"""

import dataclasses
import glob
import json
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
from tyro.conf import Positional, arg

from utils.logger import RunArgs
from utils.mpi import RunError

ASIDE = {f.name for f in dataclasses.fields(RunArgs)}  # with the next line, what may differ between the runs of a curve
ASIDE |= {"seed", "command", "versions", "git_commit", "resumed", "wandb_id"}
KEPT = dict(steps="TotalEnvInteracts", ret="AverageEpRet", steps_per_sec="StepsPerSec")  # columns of benchmark/results/*.csv
AXIS_LABELS = dict(TotalEnvInteracts="Environment steps", Time="Time (s)", Performance="Average return")
AXIS_LABELS |= dict(AverageEpRet="Average training return", AverageTestEpRet="Average test return")
COLORS = [matplotlib.color_sequences["okabe_ito"][i] for i in (5, 6, 3, 7, 1, 2, 0)]  # without its yellow, too pale for lines
DASHES = ["-", (0, (4, 1)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1))]
STYLE = {"font.size": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.title_fontsize": 6.5}
STYLE |= {"axes.grid": True, "grid.color": "0.88", "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.linewidth": 0.6}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "xtick.major.size": 2, "ytick.major.size": 2}
STYLE |= {"lines.linewidth": 1, "text.usetex": False, "text.parse_math": False, "pdf.fonttype": 42, "savefig.dpi": 300}


@dataclass
class Args:
    logdirs: Positional[tuple[Path, ...]] = (Path("data"),)  # directories to search for runs; prefixes are completed
    legend: Annotated[
        tuple[str, ...], arg(aliases=["-l"])
    ] = ()  # names of the curves, one for each directory after the completion
    xaxis: Annotated[str, arg(aliases=["-x"])] = "TotalEnvInteracts"  # column on the x-axis: TotalEnvInteracts, Epoch, Time
    value: Annotated[tuple[str, ...], arg(aliases=["-y"])] = ("Performance",)  # columns on the y-axis, each a row of panels
    count: bool = False  # draw each run on its own instead of averaging over seeds
    smooth: Annotated[int, arg(aliases=["-s"])] = 1  # width of the averaging window, in rows
    select: tuple[str, ...] = ()  # show only runs whose path contains all of these
    exclude: tuple[str, ...] = ()  # show only runs whose path contains none of these
    est: Literal["mean", "median", "max", "min"] = "mean"  # what the line is, over seeds
    band: Literal["std", "ci"] = "std"  # standard deviation over seeds, or the bootstrapped 95% interval of the line
    out: Path | None = None  # figure to write, .png, .svg or .pdf; a window opens if not given


@dataclass
class Run:
    """A run: its directory, config.json, progress.txt as floats (NaN where blank), and the name of its curve."""

    dir: Path
    config: dict
    rows: pd.DataFrame
    name: str

    @property
    def env_id(self):
        return str(self.config.get("env_id", ""))


def _complete(path):
    """The path itself if it exists, else the directories and kept curves that begin with it."""
    matches = path.parent.glob(glob.escape(path.name) + "*") if path.name else []
    logdirs = [path] if path.exists() else sorted(p for p in matches if p.is_dir() or p.suffix == ".csv")
    if not logdirs:
        raise RunError(f"{path}: there is no such directory, and none that begins so")
    return logdirs


def read_run(file):
    """The run whose rows are in `file`, a progress.txt or a kept .csv; without a last line that was cut off, which it says on
    stderr. Raises OSError or ValueError where it cannot be read."""
    kept = file.suffix == ".csv"
    run_dir = file.with_suffix("") if kept else file.parent
    config = json.loads((file.with_suffix(".json") if kept else file.with_name("config.json")).read_text())
    if not isinstance(config, dict):
        raise ValueError("its configuration is no JSON object")
    *lines, rest = file.read_text(errors="replace").split("\n")
    cells = [line.split("," if kept else "\t") for line in lines]
    if len(cells) > 1 and len(cells[-1]) < len(cells[0]):
        rest = cells.pop()
    if len(cells) < 2:
        raise ValueError(f"{file.name} has no rows")
    if rest:
        print(f"left out, the incomplete last line of {file}", file=sys.stderr)
    columns = KEPT | (dict(ret="AverageTestEpRet") if config.get("num_test_episodes") else {}) if kept else {}
    names = [columns.get(name, name) for name in cells.pop(0)]
    if len(set(names)) < len(names):
        raise ValueError(f"{file.name} has two columns {max(names, key=names.count)}")
    for k, row in enumerate(cells, start=2):
        if len(row) != len(names):
            raise ValueError(f"line {k} of {file.name} has {len(row)} cells under {len(names)} columns")
    values = np.array([[float(cell.strip() or "nan") for cell in row] for row in cells])
    rows = pd.DataFrame(np.where(np.isfinite(values), values, np.nan), columns=names)
    name = str(config.get("exp_name") or re.sub(r"_s\d+(_\d+)?$", "", run_dir.name))
    env_id = re.sub(r"[^A-Za-z0-9_.+=,-]", "-", str(config.get("env_id", "")))  # as the logger writes it
    return Run(run_dir, config, rows, re.sub(rf"_{re.escape(env_id)}(?=_|$)", "", name))  # the panel's title has the environment


def load_runs(paths, select=(), exclude=(), legend=()):
    """Read all runs, and curves kept by benchmark.score, below `paths`: a list of Run.

    A path that does not exist stands for all directories that begin with it. `select` and `exclude` are substrings of which
    a run's path has to contain all, or none. `legend` names the curves: one name for each directory, after the completion,
    that holds runs. Runs that cannot be read are left out, with a line on stderr. Raises RunError if there are none.
    """
    logdirs, seen = {}, set()
    for logdir in [logdir for path in paths for logdir in _complete(Path(path))]:
        files = [logdir] if logdir.is_file() else [*logdir.rglob("progress.txt"), *logdir.rglob("*.csv")]
        for file in sorted(file for file in files if file.suffix != ".csv" or file.with_suffix(".json").exists()):
            name = str(file.with_suffix("") if file.suffix == ".csv" else file.parent)
            wanted = all(s in name for s in select) and not any(s in name for s in exclude)
            if wanted and file.resolve() not in seen:
                seen.add(file.resolve())
                try:
                    logdirs.setdefault(logdir, []).append(read_run(file))
                except (OSError, ValueError) as error:
                    print(f"left out, {str(error).splitlines()[0]}: {name}", file=sys.stderr)
    logdirs = {logdir: runs for logdir, runs in logdirs.items() if runs}
    if not logdirs:
        rules = ", with these --select and --exclude" if select or exclude else ""
        raise RunError(f"no runs (directories with progress.txt and config.json) below {', '.join(map(str, paths))}{rules}")
    if legend and len(legend) != len(logdirs):
        raise RunError(f"--legend: {len(legend)} names for {len(logdirs)} directories: {', '.join(map(str, logdirs))}")
    for name, runs in zip(legend, logdirs.values(), strict=False):
        for run in runs:
            run.name = name
    return [run for runs in logdirs.values() for run in runs]


def group_runs(runs):
    """Experiments: {(environment, label): runs that differ only in their seed}, in the order of `runs`.

    The label is the name, and what sets the configurations apart if one name stands for several in an environment.
    """
    groups, experiments = {}, {}
    for run in runs:
        config = {k: v for k, v in run.config.items() if k not in ASIDE}
        groups.setdefault((run.name, run.env_id, json.dumps(config, sort_keys=True)), []).append(run)
    for (name, env_id, key), members in groups.items():
        config, rivals = json.loads(key), [other for other in groups if other[0] == name]
        if len(rivals) > len({rival_env for _, rival_env, _ in rivals}):
            differ = [k for k in config if k != "env_id" and any(json.loads(r[2]).get(k) != config[k] for r in rivals)]
            name = ", ".join([name, *(f"{k}={config[k]}" for k in differ)])
        experiments.setdefault((env_id, name), []).extend(members)  # 1 and 1.0, null and absent are no difference
    return experiments


def one_per_seed(runs):
    """Of the runs of each seed the longest; says on stderr which ones it leaves out."""
    seeds = {}
    for run in sorted(runs, key=lambda run: -len(run.rows)):
        longest = seeds.setdefault(str(run.config.get("seed", run.dir)), run)
        if longest is not run:
            print(f"left out, {longest.dir} has the same seed and no fewer rows: {run.dir}", file=sys.stderr)
    return list(seeds.values())


def smoothed(y, window):
    """The mean over the `window` rows around each row, of those that exist and hold a number; y (n,), NaN where blank."""
    return pd.Series(y).rolling(window, min_periods=1, center=True).mean().to_numpy()


def column(run, value):
    """The column that `value` stands for in this run: its own name, unless it is Performance."""
    tested = "AverageTestEpRet" in run.rows and run.rows["AverageTestEpRet"].notna().any()
    return value if value != "Performance" else "AverageTestEpRet" if tested else "AverageEpRet"


def curve(run, xaxis, value, smooth=1):
    """x and y of one run, arrays (n,) without blanks. Raises ValueError if it has no such curve."""
    name = column(run, value)
    for needed in (xaxis, name):
        if needed not in run.rows or run.rows[needed].isna().all():
            raise ValueError(f"it has no numbers in {needed}")
    x, y = run.rows[xaxis].to_numpy(), smoothed(run.rows[name].to_numpy(), smooth)
    known = ~(np.isnan(x) | np.isnan(y))
    if not known.any() or (np.diff(x[known]) <= 0).any():
        raise ValueError(f"its {xaxis} does not increase from row to row")
    return x[known], y[known]


def average(curves, est="mean", band="std"):
    """x, line, low, high, arrays (n,), of several seeds' curves (x, y): at all their x in the range that they share.

    The standard deviation is that of these seeds, with a division by their number.
    """
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(start <= grid) & (grid <= end)]
    y = np.stack([np.interp(grid, *xy) for xy in curves])  # (seeds, n)
    estimate = getattr(np, est)
    line, rng = estimate(y, axis=0), np.random.default_rng(0)  # the same figure every time
    if band == "std":
        return grid, line, line - y.std(0), line + y.std(0)
    resampled = [estimate(y[rng.integers(len(y), size=len(y))], axis=0) for _ in range(1000)]
    return grid, line, *np.percentile(resampled, [2.5, 97.5], axis=0)


def plot(runs, value=("Performance",), xaxis="TotalEnvInteracts", smooth=1, est="mean", band="std", count=False):
    """Draw the learning curves of `runs`, a list of Run: a panel for each environment, a row of them for each value.

    The arguments are those of the command line. Returns a matplotlib Figure (unknown to pyplot). Raises RunError for a
    column that no run has, and if there is nothing to draw; a run without a curve is left out, with a line on stderr.
    """
    if smooth < 1 or not value:
        raise RunError(f"--smooth {smooth}: has to be at least 1" if value else "--value: name a column")
    there = sorted(set().union(*(run.rows.columns for run in runs)))
    for flag, name in [("xaxis", xaxis), *(("value", name) for name in value if name != "Performance")]:
        if name not in there:
            raise RunError(f"--{flag} {name}: no run has this column; there are {', '.join(there)}")

    experiments = group_runs(runs)
    labels = list(dict.fromkeys(label for _, label in experiments))
    suffixes = list(dict.fromkeys(map(_suffix, runs)))
    lines = []  # environment, label, runs, number of the colour, number of the dashes
    for (env_id, label), members in experiments.items():
        k = labels.index(label)
        if not count:
            lines.append((env_id, label, one_per_seed(members), k, k // len(COLORS)))
        for run in members if count else []:
            i = suffixes.index(_suffix(run))
            look = (k, i) if len(labels) > 1 else (i, i // len(COLORS))
            lines.append((env_id, f"{label} {suffixes[i]}", [run], *look))

    panels = [(name, env_id) for name in value for env_id in dict.fromkeys(run.env_id for run in runs)]
    columns = len(panels) // len(value)
    if len(value) == 1 and columns > 3:
        columns = -(-columns // -(-columns // 3))  # rows of at most 3, as full as can be
    handles, sizes, ends, notes = {}, set(), [], []  # by label; numbers of seeds; greatest x; for stderr
    with matplotlib.rc_context(STYLE):
        fig = Figure(layout="constrained")
        axes = fig.subplots(-(-len(panels) // columns), columns, squeeze=False)
        for ax, (name, env_id) in zip(axes.flat, panels, strict=False):
            for _, label, members, color, dashes in (line for line in lines if line[0] == env_id):
                curves = _curves(members, xaxis, name, smooth, notes)
                if not curves:
                    continue
                x, line, low, high = average(curves, est, band)
                look = dict(color=COLORS[color % len(COLORS)], linestyle=DASHES[dashes % len(DASHES)])
                handles[label] = ax.plot(x, line, marker="o" if len(x) == 1 else "", markersize=3, **look)[0]
                if len(curves) > 1:
                    ax.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0, zorder=1.5)
                sizes.add(len(curves))
                ends.append(x[-1])
        for note in dict.fromkeys(notes):
            print(note, file=sys.stderr)
        if not ends:
            raise RunError(f"nothing to draw: no run has a curve of {' or '.join(value)} over {xaxis}")
        _label_axes(axes, panels, xaxis, max(ends))
        tested = {column(run, "Performance") for run in runs} if "Performance" in value else ()
        over = f"{est} over {' to '.join(map(str, sorted({min(sizes), max(sizes)})))} seeds, band: "
        over += "standard deviation" if band == "std" else f"bootstrapped 95% interval of the {est}"
        caption = ["single runs" if count else over if max(sizes) > 1 else "1 seed"]
        caption += [f"smoothed over {smooth} epochs"] if smooth > 1 else []
        caption += ["test return where there is one, else training return"] if len(tested) > 1 else []
        fig.align_ylabels()
        _add_legend(fig, axes, handles, "; ".join(caption).capitalize())
    return fig


def _suffix(run):
    """What tells a run from the other seeds: s0, s0_1."""
    return re.search(r"s\d+(_\d+)?$|$", run.dir.name)[0] or run.dir.name


def _curves(runs, xaxis, value, smooth, notes):
    """The curves of an experiment's runs; notes which run has none, and which one cuts the others short."""
    curves = {}
    for run in runs:
        try:
            curves[run.dir] = curve(run, xaxis, value, smooth)
        except ValueError as error:
            notes.append(f"left out, {error}: {run.dir}")
    ends = {run_dir: x[-1] for run_dir, (x, _) in curves.items()}
    first, end = min(ends, key=ends.get, default=None), max(ends.values(), default=0)
    if any(x[0] > ends[first] for x, _ in curves.values()):
        notes.append(f"left out with its other seeds, some begin after its end: {first}")
        return []
    if curves and ends[first] < 0.95 * end:
        notes.append(f"curve cut at {xaxis} {ends[first]:,.0f} of {end:,.0f}, where this run ends: {first}")
    return list(curves.values())


def _label_axes(axes, panels, xaxis, end):
    """Titles, labels and ticks; `end` is the greatest x."""
    columns = axes.shape[1]
    unit, suffix = (1e6, "M") if end >= 5e5 else (1e3, "k") if end >= 5e3 else (1, "")
    for k, ax in enumerate(axes.flat):
        if k >= len(panels) or not ax.lines:
            ax.set_axis_off()
        if k < len(panels):
            value, env_id = panels[k]
            ax.margins(x=0)
            ax.set_xlim(left=0)
            ax.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])
            ax.xaxis.set_major_formatter(lambda x, _: f"{x / unit:g}{suffix if x else ''}")
            ax.set_title(env_id if k < columns or panels[k - columns][1] != env_id else "")
            ax.set_ylabel(AXIS_LABELS.get(value, value) if k % columns == 0 else "")
            ax.set_xlabel(AXIS_LABELS.get(xaxis, xaxis) if k + columns >= len(panels) else "")


def _add_legend(fig, axes, handles, caption):
    """The legend and the caption below all panels, where they hide nothing; sets the size of the figure."""
    rows, columns = axes.shape
    width = 3.5 if columns == 1 else max(7, 2.3 * columns)  # inches: a column of a paper, or its page
    fig.set_size_inches(width, 4)
    names = [textwrap.fill(label, int(13 * width)) for label in handles]  # about 13 letters to an inch
    options = dict(title=textwrap.fill(caption, int(17 * width)), frameon=False, borderpad=0, handlelength=1.6)
    for lines in range(1, len(names) + 1):
        ncols = -(-len(names) // lines)
        legend = fig.legend(handles.values(), names, loc="outside lower center", ncols=ncols, **options)
        size = legend.get_window_extent()
        if size.width < fig.bbox.width or ncols == 1:
            break
        legend.remove()
    legend.get_title().set_multialignment("center")
    fig.set_size_inches(width, rows * (2.4 if columns < 3 else 1.9) + size.height / fig.dpi)


def save(fig, out):
    """Write a figure of `plot` to a .png, .svg or .pdf file, fit for print. Raises RunError if it cannot be written."""
    out = Path(out)
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise RunError(f"--out {out}: has to end in .png, .svg or .pdf")
    try:
        with matplotlib.rc_context(STYLE):
            fig.savefig(out)
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written: {error.strerror or error}") from None


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
