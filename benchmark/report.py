"""The report on the learning benchmark: its curves in tables and figures, against the best that others published.

    python -m benchmark.report          # writes benchmark/results/README.md and the figures beside it

Reads the curves in benchmark/results and benchmark/studies, which benchmark.mujoco makes, and benchmark/published.csv.
A cell is an algorithm on an environment; those without curves are named as missing.
"""

import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from benchmark.mujoco import ENV_IDS, OFF_POLICY, ON_POLICY
from benchmark.score import Experiment, experiments, load
from utils.mpi import RunError
from utils.plot import COLORS, STYLE, load_runs, plot, save

FAMILIES = {"on-policy": ON_POLICY, "off-policy": OFF_POLICY}


@dataclass
class Args:
    results: Path = Path("benchmark/results")  # curves of the benchmark; the report goes there too
    studies: Path = Path("benchmark/studies")  # curves of the studies
    published: Path = Path("benchmark/published.csv")  # results of others: algo, env, steps, mean, std, source, note
    total_steps: int = 1_000_000  # environment steps of the runs that count, ours and others'


@dataclass
class Cell:
    """An algorithm on an environment."""

    algo: str
    env_id: str
    experiment: Experiment | None  # None if it is missing
    published: float  # the best published mean return; NaN if there is none
    source: str

    def __post_init__(self):
        if self.experiment:
            curves = self.experiment.curves()
            mean, last = curves.mean(axis=1, skipna=False), curves.index > 0.9 * curves.index[-1]
            self.seeds = curves.shape[1]
            self.at_best = curves.loc[mean.idxmax()].to_numpy()  # (seeds,): each seed's return where the mean is highest
            self.best, self.std = self.at_best.mean(), self.at_best.std()
            self.final, self.final_std = curves[last].mean().mean(), curves[last].mean().std(ddof=0)
            self.ratio = self.best / self.published


def best_published(table, algo, env_id, total_steps):
    """Mean and source of the highest published mean at `total_steps`; (NaN, "") if there is none."""
    rows = table[(table["algo"] == algo) & (table["env"] == env_id.split("-v")[0]) & (table["steps"] == total_steps)]
    if rows.empty:
        return float("nan"), ""
    row = rows.loc[rows["mean"].idxmax()]
    return float(row["mean"]), row["source"]


def load_cells(args):
    """All cells, by family. Of several experiments in a cell the one with most seeds counts; stderr names the others."""
    if not args.published.exists():
        raise RunError(f"--published {args.published}: there is no such file")
    published, found = pd.read_csv(args.published), {}
    for experiment in experiments(load(args.results)):
        config = experiment.config
        key, rival = (config["script"], config["env_id"]), None
        if config["total_steps"] == args.total_steps:
            rival = found.get(key)
            if rival is None or len(experiment.seeds) > len(rival.seeds):
                found[key], experiment = experiment, rival
        if experiment:
            print(f"left out, other arguments: {' '.join(key)}, seeds {sorted(experiment.seeds)}", file=sys.stderr)
    return {
        family: [
            Cell(
                Path(script).stem,
                env_id,
                found.get((script, env_id)),
                *best_published(published, Path(script).stem, env_id, args.total_steps),
            )
            for script in scripts
            for env_id in ENV_IDS
        ]
        for family, scripts in FAMILIES.items()
    }


def interquartile_mean(x):
    """The mean of the middle half of an array."""
    x = np.sort(x, axis=None)
    return x[len(x) // 4 : len(x) - len(x) // 4].mean()


def interval(scores, resamples=2000):
    """95% bootstrap interval of the interquartile mean; scores: an array (seeds,) per cell, within which is resampled.

    Agarwal et al. 2021, arXiv:2108.13264."""
    rng = np.random.default_rng(0)
    means = [interquartile_mean(np.concatenate([rng.choice(cell, len(cell)) for cell in scores])) for _ in range(resamples)]
    return np.percentile(means, [2.5, 97.5])


def learning_curves(families):
    """The figure of all curves: a row for each family, a column for each environment; dashed, the best published."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(11, 4.6), layout="constrained")
        axes = fig.subplots(len(families), len(ENV_IDS), squeeze=False)
        for ax, env_id in zip(axes[0], ENV_IDS, strict=True):
            ax.set_title(env_id)
        for row, (family, cells) in zip(axes, families.items(), strict=True):
            algos = list(dict.fromkeys(cell.algo for cell in cells))
            for ax, env_id in zip(row, ENV_IDS, strict=True):
                there = [cell for cell in cells if cell.env_id == env_id and cell.experiment]
                for cell in there:
                    curves, color = cell.experiment.curves().dropna(), COLORS[algos.index(cell.algo)]
                    x, mean, std = curves.index / 1e6, curves.mean(axis=1), curves.std(axis=1, ddof=0)
                    ax.plot(x, mean, color=color, label=cell.algo.upper())
                    ax.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
                    ax.axhline(cell.published, color=color, linestyle=(0, (4, 2)), linewidth=0.8)
                    ax.set_xlim(0, x[-1])
                ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}M" if x else "0")
                if not there:
                    ax.text(0.5, 0.5, "missing", transform=ax.transAxes, ha="center", color="0.5")
                    ax.set(xticks=[], yticks=[])
            row[0].set_ylabel(f"{family.capitalize()}: {'test' if family == 'off-policy' else 'training'} return")
            handles = {label: handle for ax in row for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
            if handles:
                row[-1].legend(handles.values(), handles.keys(), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        for ax in axes[-1]:
            ax.set_xlabel("Environment steps")
    return fig


def number(x):
    return "" if np.isnan(x) else f"{x:,.0f}" if abs(x) >= 200 else f"{x:.1f}"


def table(header, rows):
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def ratio(cell):
    if cell.experiment is None:
        return "missing"
    return f"{cell.ratio:.2f}" if cell.ratio >= 1 else f"**{cell.ratio:.2f}**"


def summary_table(families):
    """Lines of the table of all best points: a row for each algorithm, a column for each environment."""

    def entry(cell):
        return f"{number(cell.best)} / {number(cell.published)} ({ratio(cell)})" if cell.experiment else "missing"

    rows = []
    for cells in families.values():
        for algo in dict.fromkeys(cell.algo for cell in cells):
            rows.append([algo.upper(), *(entry(cell) for cell in cells if cell.algo == algo)])
    return table(["", *ENV_IDS], rows)


def score_table(families):
    """Lines of the table of overall scores: families, then algorithms."""
    groups = dict(families)
    groups |= {a.upper(): [c for c in f if c.algo == a] for f in families.values() for a in dict.fromkeys(c.algo for c in f)}
    rows = []
    for name, cells in groups.items():
        there = [cell for cell in cells if cell.experiment and not np.isnan(cell.published)]
        if there:
            scores = [cell.at_best / cell.published for cell in there]
            low, high = interval(scores)
            above = sum(cell.ratio >= 1 for cell in there)
            middle = interquartile_mean(np.concatenate(scores))
            rows.append([name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{above} of {len(there)}"])
    return table(["", "interquartile mean", "95% interval", "cells at 1 or more"], rows)


def cell_table(cells):
    """Lines of the table of a family's cells."""
    rows = []
    for cell in cells:
        name = [cell.algo.upper(), cell.env_id]
        if cell.experiment:
            best, final = f"{number(cell.best)} ± {number(cell.std)}", f"{number(cell.final)} ± {number(cell.final_std)}"
            rows.append([*name, cell.seeds, best, final, number(cell.published), cell.source, ratio(cell)])
        else:
            rows.append([*name, 0, "", "", number(cell.published), cell.source, "missing"])
    return table(["", "environment", "seeds", "best point", "final 10%", "best published", "by", "ratio"], rows)


def study(runs, name, smooth):
    """The figure of a study, whose curves are named by the function `name` of their configuration, and its table."""
    for run in runs:
        run.name = name(run.config)
    fig = plot(runs, smooth=smooth)
    rows = []
    for label in dict.fromkeys(run.name for run in runs):
        finals = [run.rows["AverageEpRet"].dropna().tail(smooth).mean() for run in runs if run.name == label]
        seeds = sorted(run.config["seed"] for run in runs if run.name == label)
        rows.append([label, ", ".join(map(str, seeds)), f"{number(np.mean(finals))} ± {number(np.std(finals))}"])
    return fig, table(["", "seeds", "final return"], rows)


def value_fits(args):
    """
    ## Value fits

    The reference's exercise 2.1: what the critic is worth to TRPO, on Hopper-v4. A critic that is never trained stays near
    the mean return, and advantages are little more than discounted rewards to go.
    """
    runs = [run for run in load_runs([args.results]) if (run.config["script"], run.env_id) == ("trpo.py", "Hopper-v4")]
    runs += load_runs([args.studies / "value-fits"])
    return study(runs, lambda config: f"TRPO, train_v_iters {config['train_v_iters']}", smooth=10)


def broadcast(args):
    """
    ## A silent bug

    The reference's exercise 2.2: DDPG on HalfCheetah-v4, and DDPG with a critic whose values are (B, 1) instead of (B,), so
    that its loss broadcasts to (B, B) without an error (`benchmark/ddpg_no_squeeze.py`).
    """
    names = {"ddpg.py": "DDPG", "ddpg_no_squeeze.py": "critic without squeeze"}
    return study(load_runs([args.studies / "broadcast"]), lambda config: names[config["script"]], smooth=1)


def write(args):
    """Write README.md and the figures. Returns the cells by family."""
    families = load_cells(args)
    cells = [cell for family in families.values() for cell in family]
    there, missing = [c for c in cells if c.experiment], [c for c in cells if not c.experiment]
    if not there:
        raise RunError(f"no finished runs in {args.results}; python -m benchmark.mujoco makes them")
    configs = [json.loads(file.read_text()) for file in sorted(args.results.glob("*.json"))]
    versions = sorted({", ".join(f"{k} {v}" for k, v in config.get("versions", {}).items()) for config in configs})
    commits = {}
    for config in configs:
        commits.setdefault(str(config.get("git_commit"))[:10], set()).add(Path(config["script"]).stem.upper())
    save(learning_curves(families), args.results / "curves.png")
    lines = [
        "# Results of the learning benchmark",
        "",
        f"Six algorithms on five environments, {args.total_steps:,} environment steps, each file's own defaults, the same on all",
        "environments. `python -m benchmark.mujoco` makes the curves, `python -m benchmark.report` this page from them.",
        "",
        "On-policy, a point of a curve is the mean return in training, of the stochastic policy, over 10 epochs; off-policy, the",
        "mean of 10 deterministic test episodes each 10,000 steps. *Best point* is the highest point of the seed-averaged curve,",
        "the measure of the TD3 paper; *final 10%* is the mean over the last 10% of the steps; ± is the standard deviation over",
        f"the seeds. *Best published* is the highest mean that we know for the algorithm at {args.total_steps:,} steps, from",
        "`benchmark/published.csv` (for VPG also A2C, a policy gradient with a critic as ours is); *ratio* is our best point",
        "divided by it, bold where it falls short.",
        "",
        "![Learning curves: means and standard deviations over seeds; dashed, the best published](curves.png)",
        "",
        "Best point / best published (ratio):",
        "",
        *summary_table(families),
        "",
        "Interquartile mean of the ratios over all runs, each at the best point of its cell's curve, with the interval of a",
        "bootstrap that resamples the seeds within each cell (arXiv:2108.13264):",
        "",
        *score_table(families),
        "",
    ]
    if missing:
        lines += [f"Missing: {', '.join(f'{cell.algo.upper()} {cell.env_id}' for cell in missing)}.", ""]
    for family, members in families.items():
        lines += [f"## {family.capitalize()}", "", *cell_table(members), ""]
    for suite, make in {"value-fits": value_fits, "broadcast": broadcast}.items():
        command = f"`python -m benchmark.mujoco --suite {suite}`"
        try:
            fig, rows = make(args)
        except RunError as error:
            print(f"left out, {error}", file=sys.stderr)
            lines += [f"Missing: the study {suite} ({command}).", ""]
            continue
        save(fig, args.results / f"{suite}.png")
        lines += [*inspect.cleandoc(make.__doc__).splitlines(), command, "", *rows, "", f"![{suite}]({suite}.png)", ""]
    runs = "; ".join(f"{commit}: {', '.join(sorted(algos))}" for commit, algos in commits.items())
    lines += ["## Runs", "", f"Commits {runs}.", f"Versions: {'; '.join(versions)}.", ""]
    (args.results / "README.md").write_text("\n".join(lines))
    return families


def main(args):
    families = write(args)
    print("\n".join([*summary_table(families), "", *score_table(families)]))
    print(f"written: {args.results / 'README.md'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
