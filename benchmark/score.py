"""Score runs: the best point of the return, averaged over seeds.

    python -m benchmark.score data                                  # all runs below data/
    python -m benchmark.score data --save benchmark/results         # and keep their curves as small CSV files
    python -m benchmark.score benchmark/results                     # score what was kept

A point of a run's curve is the return of its test episodes (ddpg, td3, sac), and where there are none the mean of
`AverageEpRet`, the return in training, over the last 10 epochs (those in which an episode ended).
`best` is the mean over the seeds of each seed's best point; `best of mean` the best point of the seed-averaged curve,
which is never higher. Runs that differ in more than their seed are different experiments, each in a line of its own.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from tyro.conf import Positional

from utils.plot import ASIDE


@dataclass
class Args:
    paths: Positional[tuple[Path, ...]]  # directories that hold runs, or kept curves
    window: int = 10  # epochs in a point of the training return
    save: Path | None = None  # directory for <run>.csv (steps, ret, steps_per_sec) and <run>.json (its configuration)


@dataclass
class Experiment:
    """Runs that differ in nothing but their seed."""

    config: dict  # of one of them
    seeds: dict  # from a seed to the DataFrame of its run: steps, ret, steps_per_sec

    def curves(self, window=10):
        """DataFrame: a row for each point, indexed by its environment steps; a column for each seed."""
        window = 1 if self.config.get("num_test_episodes") else window
        points = {seed: rows.set_index("steps")["ret"].rolling(window, 1).mean() for seed, rows in sorted(self.seeds.items())}
        return pd.DataFrame(points).iloc[min(window, *map(len, points.values())) - 1 :]


def load(path):
    """The runs below `path`: a list of (name, configuration, DataFrame with steps, ret, steps_per_sec)."""
    runs = []
    for file in sorted(path.rglob("progress.txt")):
        if file.stat().st_size == 0:
            continue
        config = json.loads((file.parent / "config.json").read_text())
        ret = "AverageTestEpRet" if config.get("num_test_episodes") else "AverageEpRet"
        rows = pd.read_csv(file, sep="\t")[["TotalEnvInteracts", ret, "StepsPerSec"]].round(1)
        rows.columns = ["steps", "ret", "steps_per_sec"]
        runs.append((file.parent.name, config, rows))
    for file in sorted(path.rglob("*_s*.csv")):
        runs.append((file.stem, json.loads(file.with_suffix(".json").read_text()), pd.read_csv(file)))
    return runs


def save(name, config, rows, folder):
    """Keep a run's curve as <folder>/<name>.csv and its configuration as <name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(folder / f"{name}.csv", index=False)
    kept = {k: v for k, v in config.items() if k not in ("command", "data_dir", "exp_name", "resume")}
    (folder / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def experiments(runs):
    """The Experiments of `runs` (as `load` gives them), by environment. Says on stderr which runs it leaves out."""
    found = {}
    for name, config, rows in runs:
        if rows["steps"].iloc[-1] < config["total_steps"]:
            print(f"left out, not finished: {name}", file=sys.stderr)
            continue
        key = json.dumps({k: v for k, v in config.items() if k not in ASIDE}, sort_keys=True)
        experiment = found.setdefault((config["env_id"], key), Experiment(config, {}))
        if config["seed"] in experiment.seeds:
            print(f"left out, seed {config['seed']} is there already: {name}", file=sys.stderr)
        else:
            experiment.seeds[config["seed"]] = rows
    return [experiment for _, experiment in sorted(found.items(), key=lambda item: item[0])]


def main(args):
    runs = [run for path in args.paths for run in load(path)]
    found = experiments(runs)
    print(
        f"{'script':9}{'environment':16}{'seeds':>6}{'best':>8}{'best of mean':>14}{'final':>8}{'steps/s':>9}   best of each seed"
    )
    for experiment in found:
        curves = experiment.curves(args.window)
        mean, each = curves.mean(axis=1, skipna=False), curves.max()
        speed = pd.concat([rows["steps_per_sec"] for rows in experiment.seeds.values()]).median()
        print(
            f"{experiment.config['script']:9}{experiment.config['env_id']:16}{len(each):6}{each.mean():8.0f}{mean.max():14.0f}"
            f"{mean.iloc[-1]:8.0f}{speed:9.0f}   {', '.join(f'{s}: {best:.0f}' for s, best in each.items())}"
        )
    for name, config, rows in runs if args.save else []:
        if any(rows is kept for experiment in found for kept in experiment.seeds.values()):
            save(name, config, rows, args.save)


if __name__ == "__main__":
    main(tyro.cli(Args))
