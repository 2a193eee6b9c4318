"""Score runs: the best point of the return, averaged over seeds.

    python -m benchmark.score data                                  # all runs below data/
    python -m benchmark.score data --save benchmark/results         # and keep their curves as small CSV files
    python -m benchmark.score benchmark/results                     # score what was kept

A point of a run's curve is the return of its test episodes (ddpg, td3, sac), and where there are none the mean of
`AverageEpRet`, the return in training, over the last `--window` epochs (those in which an episode ended).
`best` is the mean over the seeds of each seed's best point; `best of mean` the best point of the seed-averaged curve,
which is never higher. Runs that differ in more than their seed are different experiments, each in a line of its own.
"""

import json
import pathlib
import sys
from dataclasses import dataclass

import pandas as pd
import tyro
from tyro.conf import Positional

ASIDE = "seed exp_name data_dir save_freq device torch_threads track wandb_project wandb_entity wandb_group".split()
ASIDE += (
    "command versions git_commit keep_checkpoints resume wandb_video wandb_id".split()
)  # what may differ between the seeds of an experiment


@dataclass
class Args:
    paths: Positional[tuple[pathlib.Path, ...]]  # directories that hold runs, or kept curves
    window: int = 10  # epochs in a point of the training return
    save: pathlib.Path | None = None  # directory for <run>.csv (steps, ret, steps_per_sec) and <run>.json (its configuration)


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


def main(args):
    experiments = {}
    for name, config, rows in [run for path in args.paths for run in load(path)]:
        if rows["steps"].iloc[-1] < config["total_steps"]:
            print(f"left out, not finished: {name}", file=sys.stderr)
            continue
        key = json.dumps({k: v for k, v in config.items() if k not in ASIDE}, sort_keys=True)
        seeds = experiments.setdefault(key, {})
        if config["seed"] in seeds:
            print(f"left out, seed {config['seed']} is there already: {name}", file=sys.stderr)
            continue
        seeds[config["seed"]] = rows
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            rows.to_csv(args.save / f"{name}.csv", index=False)
            kept = {k: v for k, v in config.items() if k not in ("command", "data_dir", "exp_name", "resume")}
            (args.save / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(
        f"{'script':9}{'environment':16}{'seeds':>6}{'best':>8}{'best of mean':>14}{'final':>8}{'steps/s':>9}   best of each seed"
    )
    for key, seeds in sorted(experiments.items(), key=lambda item: (json.loads(item[0])["env_id"], item[0])):
        config = json.loads(key)
        window = 1 if config.get("num_test_episodes") else args.window
        smooth = pd.DataFrame({s: rows.set_index("steps")["ret"].rolling(window, 1).mean() for s, rows in seeds.items()})
        smooth = smooth.iloc[min(window, len(smooth)) - 1 :]
        mean, each = smooth.mean(axis=1, skipna=False), smooth.max()
        speed = pd.concat([rows["steps_per_sec"] for rows in seeds.values()]).median()
        print(
            f"{config['script']:9}{config['env_id']:16}{len(seeds):6}{each.mean():8.0f}{mean.max():14.0f}{mean.iloc[-1]:8.0f}"
            f"{speed:9.0f}   {', '.join(f'{s}: {best:.0f}' for s, best in sorted(each.items()))}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
