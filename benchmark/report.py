"""The report on the learning benchmark: its curves in tables and figures, against the best that others published.

    python -m benchmark.report          # writes benchmark/results/README.md and the figures beside it

Reads the curves in benchmark/results and benchmark/studies, which benchmark.mujoco makes, and benchmark/published.csv.
A cell is an algorithm on an environment; those without curves are named as missing.
"""

import importlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from benchmark.mujoco import ENV_IDS, OFF_POLICY, ON_POLICY, same_arguments
from benchmark.score import Experiment, compare, experiments, load
from utils.plot import COLORS, STYLE, plot, save
from utils.process import RunError
from utils.runs import load_runs

FAMILIES = {"on-policy": ON_POLICY, "off-policy": OFF_POLICY}


@dataclass
class Args:
    results: Path = Path("benchmark/results")  # curves of the benchmark; the report goes there too
    studies: Path = Path("benchmark/studies")  # curves of the studies
    published: Path = Path("benchmark/published.csv")  # results of others: algo, env, steps, mean, std, source, best_of, note
    total_steps: int = 1_000_000  # environment steps of the runs that count, ours and others'


@dataclass
class Cell:
    """An algorithm on an environment."""

    algo: str
    env_id: str
    experiment: Experiment | None  # None if it is missing
    others: pd.DataFrame  # what others published for it

    def __post_init__(self):
        if self.experiment:
            self.curves = self.experiment.tests()
            self.mean, self.seeds = self.curves.mean(axis=1), self.curves.shape[1]
            five = self.curves.rolling(min(5, len(self.curves))).mean()
            self.point, self.std = self.mean.max(), self.curves.loc[self.mean.idxmax()].std(ddof=0)
            self.best_5 = five.mean(axis=1).max()
            points = self.curves if self.seeds > 2 else five  # a single point of one or two seeds holds too much noise
            at_best, self.of_runs = points.loc[points.mean(axis=1).idxmax()], self.curves.max()  # (seeds,)
            self.best = at_best.mean()
            both, trained = (self.curves, self.experiment.curves(window=1)), self.curves.iloc[-1]
            finals, training = (curves[curves.index > 0.9 * curves.index[-1]].mean() for curves in both)  # (seeds,)
            self.final, self.final_std, self.training = finals.mean(), finals.std(ddof=0), training.mean()
            self.trained, self.trained_std = trained.mean(), trained.std(ddof=0)
            # each against ours that is scored as it is; what counts is where ours is furthest behind
            pairs = [(row, self.of_runs if row.best_of == "runs" else at_best) for row in self.others.itertuples()]
            none = SimpleNamespace(mean=np.nan, source="", note="", best_of="mean"), at_best
            self.theirs, self.ours = min(pairs, key=lambda pair: pair[1].mean() / pair[0].mean, default=none)
            self.published, self.ratio = self.theirs.mean, self.ours.mean() / self.theirs.mean


def has_defaults(config, but=()):
    """Whether a run had its script's own arguments, but for its environment, its steps, its seed and the names in `but`."""
    args = importlib.import_module(Path(config["script"]).stem).Args()
    return same_arguments(config, args, ("env_id", "total_steps", "seed", *but))


def load_cells(args):
    """All cells, by family. Runs without tests or with other arguments than their script's own do not count, and where two kinds
    of run are left, those with the fewer seeds; stderr names them."""
    if not args.published.exists():
        raise RunError(f"--published {args.published}: there is no such file")
    published, found = pd.read_csv(args.published), {}
    runs = load(args.results) if any(args.results.glob("*.csv")) else []
    for experiment in sorted(experiments(runs), key=lambda experiment: -len(experiment.runs)):
        config = experiment.config
        key = config["script"], config["env_id"]
        planned = config["script"] in ON_POLICY + OFF_POLICY and config["total_steps"] == args.total_steps
        if planned and key not in found and has_defaults(config) and not experiment.tests().empty:
            found[key] = experiment
        else:
            print(f"left out, other arguments or no tests: {' '.join(key)}, seeds {sorted(experiment.runs)}", file=sys.stderr)

    def cell(script, env_id):
        algo, env = Path(script).stem, env_id.split("-v")[0]
        others = (published["algo"] == algo) & (published["env"] == env) & (published["steps"] == args.total_steps)
        others &= published["mean"] > 0  # of less there is no part
        return Cell(algo, env_id, found.get((script, env_id)), published[others])

    return {family: [cell(*key) for key in itertools.product(scripts, ENV_IDS)] for family, scripts in FAMILIES.items()}


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
    """The figure of all curves: a row for each family, a column for each environment; dashed, the published."""
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
                    curves, color = cell.curves, COLORS[algos.index(cell.algo)]
                    x, mean, std = curves.index / 1e6, curves.mean(axis=1), curves.std(axis=1, ddof=0)
                    ax.plot(x, mean, color=color, label=cell.algo.upper())
                    ax.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
                    ax.axhline(cell.published, color=color, linestyle=(0, (4, 2)), linewidth=0.8)
                    ax.set_xlim(0, x[-1])
                ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}M" if x else "0")
                if not there:
                    ax.text(0.5, 0.5, "missing", transform=ax.transAxes, ha="center", color="0.5")
                    ax.set(xticks=[], yticks=[])
            row[0].set_ylabel(f"{family.capitalize()}: return")
            handles = {label: handle for ax in row for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
            if handles:
                row[-1].legend(handles.values(), handles.keys(), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        for ax in axes[-1]:
            ax.set_xlabel("Environment steps")
    return fig


def number(x):
    return "" if np.isnan(x) else f"{x:,.0f}" if abs(x) >= 200 else f"{x:.1f}"


def with_deviation(mean, std, seeds):
    return f"{number(mean)} ± {number(std)}" if seeds > 1 and not np.isnan(mean) else number(mean)


def table(header, rows):
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def ratio(cell):
    if np.isnan(cell.published):
        return "none published"
    down = f"{np.floor(100 * cell.ratio) / 100:.2f}"  # so that nothing short of 1 reads 1.00
    return down if cell.ratio >= 1 else f"**{down}**"


def summary_table(families):
    """Lines of the table of our best: a row for each algorithm, a column for each environment."""

    def entry(cell):
        if not cell.experiment:
            return "missing"
        return f"{number(cell.ours.mean())}{'†' * (cell.theirs.best_of == 'runs')} / {number(cell.published)} ({ratio(cell)})"

    by_algo = itertools.groupby(itertools.chain(*families.values()), lambda cell: cell.algo)
    return table(["", *ENV_IDS], [[algo.upper(), *map(entry, cells)] for algo, cells in by_algo])


def score_table(families):
    """Lines of the table of overall scores: families, then algorithms."""
    groups = dict(families)
    groups |= {a.upper(): [c for c in f if c.algo == a] for f in families.values() for a in dict.fromkeys(c.algo for c in f)}
    rows = []
    for name, cells in groups.items():
        there = [cell for cell in cells if cell.experiment and not np.isnan(cell.published)]
        if there:
            scores = [cell.ours / cell.published for cell in there]
            low, high = interval(scores)
            above = sum(cell.ratio >= 1 for cell in there)
            middle = interquartile_mean(np.concatenate(scores))
            between = f"{low:.2f} to {high:.2f}" if any(cell.seeds > 1 for cell in there) else "one seed"
            rows.append([name, f"{middle:.2f}", between, f"{above} of {len(there)}"])
    return table(["", "interquartile mean", "95% interval", "cells at 1 or more"], rows)


def cell_table(cells):
    """Lines of the table of a family's cells."""
    rows = []
    for cell in cells:
        name = [cell.algo.upper(), cell.env_id]
        if cell.experiment:
            point = with_deviation(cell.point, cell.std, cell.seeds)
            final = with_deviation(cell.final, cell.final_std, cell.seeds)
            trained = with_deviation(cell.trained, cell.trained_std, cell.seeds)
            noisy = number(cell.training) if f"{cell.algo}.py" in ON_POLICY else ""
            points = [point, number(cell.best_5), number(cell.of_runs.mean()), final, trained, noisy]
            source = cell.theirs.source + " (read off a curve)" * (cell.theirs.note == "read off a curve")
            rows.append([*name, cell.seeds, *points, number(cell.published), source, ratio(cell)])
        else:
            rows.append([*name, 0, *[""] * 8, "missing"])
    points = ["best point", "best 5", "each run's best", "final 10%", "trained", "in training"]
    return table(["", "environment", "seeds", *points, "published", "by", "ratio"], rows)


def time_table(cells, published):
    """Lines of the table of when the seed-averaged curves reach the returns that CleanRL's documentation states."""
    rows = []
    for cell in cells:
        theirs = published["source"].str.startswith("CleanRL") & (published["algo"] == cell.algo)
        for row in published[theirs & (published["env"] == cell.env_id.split("-v")[0])].itertuples():
            reached = cell.mean.index[cell.mean >= row.mean].min()  # NaN if it is not
            speed = pd.concat([run.rows["steps_per_sec"] for run in cell.experiment.runs.values()]).median()
            ours = ["not reached", ""] if np.isnan(reached) else [f"{reached:,}", f"{reached / speed / 60:.1f}"]
            rows.append([cell.algo.upper(), cell.env_id, number(row.mean), f"{row.steps:,}", *ours])
    return table(["", "environment", "return", "their steps", "our steps", "minutes"], rows)


STUDIES = {  # the argument that differs, the name of a run by its value, text
    "value-fits": (
        "train_v_iters",
        "TRPO, train_v_iters {}".format,
        """## Value fits

Exercise 2.1 of [Spinning Up](https://spinningup.openai.com/en/latest/spinningup/exercises.html): what the critic is worth to
TRPO, on Hopper-v4. A critic that is never trained is a fixed random function around the mean return, and advantages are little
more than rewards to go, discounted by gamma lambda. The trained critic's runs are the benchmark's.""",
    ),
    "broadcast": (
        "script",
        {"ddpg.py": "DDPG", "ddpg_no_squeeze.py": "critic without squeeze"}.get,
        """## A silent bug

Exercise 2.2 of Spinning Up: DDPG on HalfCheetah-v4, and DDPG with a critic whose values are (B, 1) instead of (B,), so that
its loss broadcasts to (B, B) without an error (`benchmark/studies/ddpg_no_squeeze.py`). Networks have one layer of 300, batches
64 transitions.""",
    ),
    "extras": (
        "without",
        lambda x: "PPO" if x == "nothing" else f"without {x}",
        """## What PPO has beyond its paper

One addition at a time is left out of `ppo.py` (`benchmark/studies/ppo_without.py`). Runs have 300,000 steps, by the end of which
the learning rates have fallen to 0. Returns in training, with noise. The bars of the figure are 95% bootstrap intervals.""",
    ),
    "autotune": (
        "autotune",
        {True: "SAC, --autotune", False: "SAC, alpha 0.2"}.get,
        """## SAC's entropy coefficient

Learned with `--autotune`, which starts it at 0.2 and holds the entropy at minus the number of action dimensions, or fixed at 0.2,
the default: the benchmark's runs, cut to the study's steps. On HalfCheetah that of `--autotune` was made by `sac.py` itself, with
`--total-steps 200000`.""",
    ),
    "early-updates": (
        "update_after",
        {1_000: "TD3, --update-after 1000", 10_000: "TD3"}.get,
        """## When TD3 begins to learn

After 10,000 steps, when it no longer acts at random: the default and the benchmark's runs; or after 1,000, as DDPG and SAC do.""",
    ),
}


def load_study(suite, args):
    """The runs of a study, named, and the benchmark's of the same script, environment and seed, up to as many steps, if the study
    differs from its defaults in nothing else."""
    key, name, _ = STUDIES[suite]
    runs, there = load_runs([args.studies / suite]), {}
    for run in runs:
        if run.config["script"] in ON_POLICY + OFF_POLICY and has_defaults(run.config, but=[key]):
            there[run.config["script"], run.env_id, run.config["seed"]] = run.config["total_steps"]
    for run in load_runs([args.results]) if there else ():
        steps = there.get((run.config["script"], run.env_id, run.config["seed"]))
        if steps and has_defaults(run.config):
            run.rows = run.rows[run.rows["TotalEnvInteracts"] <= steps]
            runs.append(run)
    for run in runs:
        run.name = name(run.config[key])
    return runs


def differences(finals):
    """The figure of a study of many names: their final returns minus those of the first, with 95% intervals.

    finals: a dict from an environment to a dict from a name to an array (seeds,).
    """
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(7, 2.2), layout="constrained")
        axes = fig.subplots(1, len(finals), sharey=True, squeeze=False)[0]
        for ax, (env_id, (first, *others)) in zip(axes, finals.items(), strict=True):
            for name in reversed(others):
                x, low, high, _ = compare(finals[env_id][first], finals[env_id][name])
                ax.errorbar(x, name, xerr=[[x - low], [high - x]], fmt="o", color=COLORS[0], markersize=3)
            ax.axvline(0, color="0.4", linewidth=0.8)
            ax.locator_params(axis="x", nbins=5)
            ax.set(title=env_id, xlabel=f"Final return minus that of {first}", xmargin=0.05)
    return fig


def study(suite, args):
    """Lines on a study and its figure. Raises RunError if curves are missing."""
    text, command = STUDIES[suite][-1], f"`python -m benchmark.mujoco --suite {suite}`"
    runs = load_study(suite, args)
    names = list(dict.fromkeys(run.name for run in runs))
    if len(names) < 2:
        raise RunError(f"the study {suite} has only curves of {names}")
    smooth, rows, finals = 1 if "num_test_episodes" in runs[0].config else 10, [], {}
    for env_id, name in sorted({(run.env_id, run.name) for run in runs}):
        there = [run for run in runs if (run.env_id, run.name) == (env_id, name)]
        if len({run.rows["TotalEnvInteracts"].iloc[-1] for run in there}) > 1:
            raise RunError(f"the study {suite} has runs of several lengths: {name}, {env_id}")
        final = np.array([run.rows["Performance"].tail(len(run.rows) // 10).mean() for run in there])
        finals.setdefault(env_id, {})[name] = final
        first = next(iter(finals[env_id].values()))
        several = min(len(first), len(final)) > 1 and final is not first
        difference = "{} ({} to {})".format(*map(number, compare(first, final)[:3])) if several else ""
        seeds = ", ".join(str(seed) for seed in sorted(run.config["seed"] for run in there))
        steps = f"{there[0].rows['TotalEnvInteracts'].iloc[-1]:,.0f}"
        rows.append([name, env_id, seeds, steps, with_deviation(final.mean(), final.std(), len(final)), difference])
    save(plot(runs, smooth=smooth) if len(names) == 2 else differences(finals), args.results / f"{suite}.png")
    header = ["", "environment", "seeds", "steps", "final 10%", "minus the first's (95% interval)"]
    return [text, "", command, "", *table(header, rows), "", f"![{suite}]({suite}.png)", ""]


def write(args):
    """Write README.md and the figures. Returns the cells by family."""
    families = load_cells(args)
    cells = [cell for family in families.values() for cell in family]
    there, missing = [c for c in cells if c.experiment], [c for c in cells if not c.experiment]
    if not there:
        raise RunError(f"no finished runs in {args.results}; python -m benchmark.mujoco makes them")
    lines = [
        f"""# Results of the learning benchmark

Six algorithms on five environments, {args.total_steps:,} environment steps, each file's own defaults, the same on all
environments. `python -m benchmark.mujoco` makes the curves, `python -m benchmark.report` this page from them.

- *Best point*: the highest point of the seed-averaged curve, the measure of the TD3 paper. A point is the mean of test episodes
  without noise: off-policy 10 every 10,000 steps, on-policy 5 of some 50 models. The fewer seeds a curve is averaged over, the
  more noise its best point holds, and the more it flatters. *Best 5* is the highest mean of five points in a row.
- *Final 10%*: the mean over the last 10% of the steps; *in training*, of the returns in training, with noise.
- *Trained*: the last point, of the trained policies, on-policy too of 10 episodes.
- ±: the standard deviation over the seeds.
- *Published*: returns at {args.total_steps:,} steps, from `benchmark/published.csv`; for VPG also A2C's, a policy gradient with a
  critic as ours is. The on-policy ones come from tests with noise (Tianshou; XuanCe and nnabla-rl, by their code), tests without
  (TD3 paper) or training (Baselines, Spinning Up), or it is not said (PPO paper). Left out are models of single runs (RL Zoo,
  Hugging Face) and results on version 5 of the environments.
- *Ratio*: our best divided by the published, rounded down, bold where it falls short; of several published that which makes it
  lowest, which is not always the highest. Our best is the best point, with one or two seeds the best 5, which flatters less.
  † XuanCe, by its script, PFRL and ChainerRL took each run's best test, the last two the mean of ten: there ours is *each run's
  best*, the mean.

Our best / the published (ratio):
""",
        *summary_table(families),
        "",
    ]
    few = [f"{c.algo.upper()} {c.env_id} ({c.seeds})" for c in there if c.seeds < (5 if c in families["on-policy"] else 2)]
    for title, names in ("Missing", [f"{c.algo.upper()} {c.env_id}" for c in missing]), ("Fewer seeds than planned", few):
        lines += [f"{title}: {', '.join(names)}.", ""] if names else []
    save(learning_curves(families), args.results / "curves.png")
    lines += [
        """![Learning curves](curves.png)

Means and standard deviations over the seeds; dashed, the published that makes the ratio, which with † is no point of a mean curve.

Interquartile mean, over all runs, of the return that counts for its cell (an algorithm on an environment), divided by the
published; interval: bootstrap over each cell's seeds (arXiv:2108.13264), too narrow where a cell has one or two:
""",
        *score_table(families),
        """
## Time to a return

When the seed-averaged curves first reach the mean return that CleanRL's documentation states for the whole run of its script, and
the minutes that this takes on one core, off-policy with tests. One point of one seed may be luck:
""",
        *time_table(there, pd.read_csv(args.published)),
        "",
    ]
    for family, members in families.items():
        lines += [f"## {family.capitalize()}", "", *cell_table(members), ""]
    for suite in STUDIES:
        try:
            lines += study(suite, args)
        except RunError as error:
            print(f"left out, {error}", file=sys.stderr)
            lines += [f"Missing: the study {suite} (`python -m benchmark.mujoco --suite {suite}`).", ""]
    commits, versions = {}, set()
    for cell in there:
        for run in cell.experiment.runs.values():
            for made in run.config, *run.config.get("resumed", []):
                commit, *dirty = str(made.get("git_commit")).partition("-")
                commits.setdefault("".join([commit[:10], *dirty]), {})[cell.algo.upper()] = None
            versions.add(", ".join(f"{name} {version}" for name, version in run.config.get("versions", {}).items()))
    runs = "; ".join(f"{commit} ({', '.join(algos)})" for commit, algos in commits.items())
    lines += ["## Runs", "", f"Commits: {runs}.", f"Versions: {'; '.join(sorted(versions))}.", ""]
    (args.results / "README.md").write_text("\n".join(lines))
    return families


def main(args):
    families = write(args)
    print("\n".join([*summary_table(families), "", *score_table(families)]))
    print(f"written: {args.results / 'README.md'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
