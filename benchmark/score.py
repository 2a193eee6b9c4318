"""Score runs: the best point of the return, averaged over seeds.

    python -m benchmark.score data                                  # all runs below data/
    python -m benchmark.score data --save curves                    # and keep their curves as small CSV files
    python -m benchmark.score curves                                # score what was kept

A point of a run's curve is the return of its test episodes (ddpg, td3, sac), and where there are none the mean of
`AverageEpRet`, the return in training, over the last 10 epochs (those in which an episode ended).
`best` is the mean over the seeds of each seed's best point; `best of mean` the best point of the seed-averaged curve,
which is never higher; `final` the last point of that curve. Runs that differ in more than their seed are different experiments,
each in a line of its own.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import tyro
from tyro.conf import Positional

from utils.mpi import RunError
from utils.plot import ASIDE, KEPT, read_run


@dataclass
class Args:
    paths: Positional[tuple[Path, ...]]  # directories that hold runs, or kept curves
    window: int = 10  # epochs in a point of the training return
    save: Path | None = None  # directory for <run>.csv (steps, ret, steps_per_sec) and <run>.json (its configuration)


@dataclass
class Run:
    """A run: its name, config.json, and a DataFrame with steps, ret (NaN where blank), steps_per_sec.

    Where the benchmark has tested the trained policy of an on-policy run, there is also test_ret, NaN but in the last row."""

    name: str
    config: dict
    rows: pd.DataFrame

    @property
    def trained(self):
        """The mean return of the trained policy without noise; NaN if it was not tested."""
        tests = "ret" if self.config.get("num_test_episodes") else "test_ret"
        return self.rows[tests].iloc[-1] if tests in self.rows else float("nan")


@dataclass
class Experiment:
    """Runs that differ in nothing but their seed."""

    runs: dict = field(default_factory=dict)  # from a seed to its Run

    @property
    def config(self):
        return next(iter(self.runs.values())).config

    def curves(self, window=10):
        """DataFrame: a row for each point, indexed by its environment steps; a column for each seed."""
        window = 1 if self.config.get("num_test_episodes") else window
        rets = {seed: run.rows.set_index("steps")["ret"] for seed, run in sorted(self.runs.items())}
        points = pd.DataFrame({seed: ret.rolling(window, 1).mean() for seed, ret in rets.items()})
        return points.iloc[min(window, *map(len, rets.values())) - 1 :]


def load(path):
    """The Runs below `path`. Those that cannot be read are left out, with a line on stderr."""
    runs = []
    for file in [*sorted(path.rglob("progress.txt")), *sorted(path.rglob("*_s*.csv"))]:
        try:
            run = read_run(file)
            ret = "AverageTestEpRet" if run.config.get("num_test_episodes") else "AverageEpRet"
            rows = run.rows[["TotalEnvInteracts", ret, "StepsPerSec"]].set_axis([*KEPT], axis=1)
            rows = rows.join(run.rows.filter(["test_ret"])).round(1)
            if rows["ret"].isna().all():
                raise ValueError("it has no returns")
            runs.append(Run(run.dir.name, run.config, rows.astype({"steps": int})))
        except (OSError, ValueError, KeyError) as error:  # pandas' own errors are ValueErrors
            print(f"left out, {str(error).splitlines()[0]}: {file}", file=sys.stderr)
    return runs


def save(run, folder, name=None):
    """Keep a run's curve as <folder>/<name>.csv, which is there whole or not at all, and then its configuration as .json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or run.name}.csv"
    run.rows.to_csv(path.with_suffix(".part"), index=False)
    os.replace(path.with_suffix(".part"), path)
    kept = {k: v for k, v in run.config.items() if k not in ("command", "data_dir", "exp_name", "resume")}
    path.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


def experiments(runs):
    """The Experiments of `runs`, by environment. Says on stderr which runs it leaves out."""
    found = {}
    for run in runs:
        if run.rows["steps"].iloc[-1] < run.config["total_steps"]:
            print(f"left out, not finished: {run.name}", file=sys.stderr)
            continue
        key = json.dumps({k: v for k, v in run.config.items() if k not in ASIDE}, sort_keys=True)
        same, seed = found.setdefault((run.config["env_id"], key), Experiment()).runs, run.config["seed"]
        if seed in same:
            print(f"left out, seed {seed} is there already: {run.name}", file=sys.stderr)
        else:
            same[seed] = run
    return [experiment for _, experiment in sorted(found.items(), key=lambda item: item[0])]


def main(args):
    found = experiments([run for path in args.paths for run in load(path)])
    if not found:
        raise RunError(f"no finished runs below {', '.join(map(str, args.paths))}")
    names = [run.name for experiment in found for run in experiment.runs.values()]
    if args.save and len(set(names)) < len(names):
        raise RunError(f"--save: two of the runs are called {max(names, key=names.count)}; keep them in different directories")
    there = [name for name in names if args.save and (args.save / f"{name}.csv").exists()]
    if there:
        raise RunError(f"--save {args.save}: {there[0]}.csv is there already; take another directory, or delete it")
    print(
        f"{'script':9} {'environment':16} {'seeds':>6}{'best':>8}{'best of mean':>14}{'final':>8}{'steps/s':>9}   best of each seed"
    )
    for experiment in found:
        curves, runs = experiment.curves(args.window), experiment.runs.values()
        mean, each = curves.mean(axis=1, skipna=False), curves.max()
        speed = pd.concat([run.rows["steps_per_sec"] for run in runs]).median()
        print(
            f"{experiment.config['script']:9} {experiment.config['env_id']:16} {len(each):6}{each.mean():8.0f}{mean.max():14.0f}"
            f"{mean.iloc[-1]:8.0f}{speed:9.0f}   {', '.join(f'{s}: {best:.0f}' for s, best in each.items())}"
        )
        for run in runs if args.save else ():
            save(run, args.save)


if __name__ == "__main__":
    main(tyro.cli(Args))
