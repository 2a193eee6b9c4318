"""Score runs: the best point of the return, averaged over seeds.

    python -m benchmark.score data                                  # all runs below data/
    python -m benchmark.score data --compare ppo my_ppo             # is my_ppo better in the end?
    python -m benchmark.score data --save curves                    # keep their curves as small CSV files
    python -m benchmark.score curves                                # score what was kept

A point of a run's curve is the return of its test episodes (ddpg, td3, sac), and where there are none the mean of
`AverageEpRet`, the return in training, over the last 10 epochs (those in which an episode ended).
`best` is the mean over the seeds of each seed's best point; `best of mean` the best point of the seed-averaged curve,
which is never higher; `final` the last point of that curve. Experiments have the names of their curves in utils.plot.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from tyro.conf import Positional

from utils.process import RunError
from utils.runs import KEPT, group_runs, load_runs, one_per_seed


@dataclass
class Args:
    paths: Positional[tuple[Path, ...]] = (Path("data"),)  # directories that hold runs, or kept curves; prefixes are completed
    window: int = 10  # epochs in a point of the training return
    compare: tuple[str, str] | None = None  # names of two experiments: how much better the second is, in each environment
    save: Path | None = None  # directory for <run>.csv (steps, ret, steps_per_sec) and <run>.json (its configuration)


@dataclass
class Experiment:
    """Runs that differ in nothing but their seed."""

    env_id: str
    name: str
    runs: dict  # from a seed to its Run

    @property
    def config(self):
        return next(iter(self.runs.values())).config

    def curves(self, window=10):
        """DataFrame: a row for each point, indexed by its environment steps; a column for each seed."""
        window = 1 if self.config.get("num_test_episodes") else window
        rets = {seed: run.rows.set_index("steps")["ret"] for seed, run in sorted(self.runs.items())}
        points = pd.DataFrame({seed: ret.rolling(window, 1).mean() for seed, ret in rets.items()})
        return points.iloc[min(window, *map(len, rets.values())) - 1 :]

    def tests(self):
        """Such a DataFrame of the tests without noise, on-policy of the models that were kept; empty if none was tested."""
        if self.config.get("num_test_episodes"):
            return self.curves().dropna()
        rets = {seed: run.rows.set_index("steps").get("test_ret", pd.Series()) for seed, run in sorted(self.runs.items())}
        return pd.DataFrame(rets).dropna(axis=1, how="all").dropna()


def load(*paths):
    """The runs below `paths`, with rows steps, ret (NaN where blank), steps_per_sec, and where the benchmark has tested the
    models of an on-policy run, test_ret, NaN where there was none. Says on stderr which have no returns."""
    runs = []
    for run in load_runs(paths):
        ret = "AverageTestEpRet" if run.config.get("num_test_episodes") else "AverageEpRet"
        rows = run.rows.reindex(columns=["TotalEnvInteracts", ret, "StepsPerSec"]).set_axis([*KEPT], axis=1)
        if rows["ret"].isna().all() or rows["steps"].isna().any():
            print(f"left out, it has no returns by steps: {run.dir}", file=sys.stderr)
            continue
        rows = rows.join(run.rows.filter(["test_ret"]))
        runs.append(replace(run, rows=rows.astype({"steps": int})))
    return runs


def save(run, folder, name=None):
    """Keep a run's curve as <folder>/<name>.csv, which is there whole or not at all, and then its configuration as .json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or run.dir.name}.csv"
    run.rows.to_csv(path.with_suffix(".part"), index=False, float_format="%.6g")
    path.with_suffix(".part").replace(path)
    kept = {k: v for k, v in run.config.items() if k not in ("command", "data_dir", "exp_name", "resume")}
    path.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


def experiments(runs):
    """The Experiments of `runs`, by environment. Says on stderr which runs it leaves out."""
    found = []
    for (env_id, name), members in sorted(group_runs(runs).items()):
        finished = []
        for run in members:
            if run.rows["steps"].iloc[-1] >= run.config.get("total_steps", 0):
                finished.append(run)
            else:
                print(f"left out, not finished: {run.dir.name}", file=sys.stderr)
        if finished:
            found.append(Experiment(env_id, name, {run.config.get("seed"): run for run in one_per_seed(finished)}))
    return found


def compare(a, b):
    """Of two arrays (seeds,): mean(b) - mean(a), the ends of its 95% bootstrap interval over seeds, and the probability of
    improvement, that a seed of b is above one of a, where equal ones count half. Agarwal et al. 2021, arXiv:2108.13264."""
    rng = np.random.default_rng(0)
    resampled = [rng.choice(b, len(b)).mean() - rng.choice(a, len(a)).mean() for _ in range(2000)]
    above, equal = (b[:, None] > a).mean(), (b[:, None] == a).mean()
    return b.mean() - a.mean(), *np.percentile(resampled, [2.5, 97.5]), above + equal / 2


def number(x):
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def print_comparison(found, names, window):
    """Compare the final returns of two experiments, named, in each environment that has both."""
    there = {(experiment.env_id, experiment.name): experiment for experiment in found}
    pairs = {env_id: [there.get((env_id, name)) for name in names] for env_id, _ in there}
    both = {env_id: pair for env_id, pair in pairs.items() if all(pair)}
    if not both:
        known = ", ".join(sorted({repr(experiment.name) for experiment in found}))
        raise RunError(f"--compare {' '.join(map(repr, names))}: no environment has both; there are {known}")
    for env_id, pair in both.items():
        a, b = (experiment.curves(window).ffill().iloc[-1].to_numpy() for experiment in pair)
        *numbers, probability = compare(a, b)
        difference, low, high = map(number, numbers)
        print(f"\n{env_id}, final return of {names[1]} ({len(b)} seeds) minus that of {names[0]} ({len(a)} seeds):")
        print(f"{difference} (95% interval {low} to {high}), probability of improvement {probability:.2f}")
        if min(len(a), len(b)) < 5:
            print("fewer than 5 seeds: the interval is narrower than it should be")


def main(args):
    found = experiments(load(*args.paths))
    if not found:
        raise RunError(f"no finished runs below {', '.join(map(str, args.paths))}")
    names = [run.dir.name for experiment in found for run in experiment.runs.values()]
    for name in names if args.save else ():
        if names.count(name) > 1 or (args.save / f"{name}.csv").exists():
            raise RunError(f"--save {args.save}: {name}.csv is there already, or two runs are called so; save to another directory")
    width = max(len("experiment"), *(len(experiment.name) for experiment in found))
    header = f"{'environment':16} {'seeds':>6}{'best':>8}{'best of mean':>14}{'final':>8}{'steps/s':>9}   best of each seed"
    print(f"{'experiment':{width}} {header}")
    for experiment in found:
        curves, runs = experiment.curves(args.window).ffill(), experiment.runs.values()
        mean, each = curves.mean(axis=1, skipna=False), curves.max()
        speed = pd.concat([run.rows["steps_per_sec"] for run in runs]).median()
        print(
            f"{experiment.name:{width}} {experiment.env_id:16} {len(each):6}{number(each.mean()):>8}{number(mean.max()):>14}"
            f"{number(mean.iloc[-1]):>8}{speed:9.0f}   {', '.join(f'{s}: {number(best)}' for s, best in each.items())}"
        )
    if args.compare:
        print_comparison(found, args.compare, args.window)
    for experiment in found if args.save else ():
        for run in experiment.runs.values():
            save(run, args.save)


if __name__ == "__main__":
    main(tyro.cli(Args))
