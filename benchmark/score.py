"""Score runs: the best point of the seed-averaged training return, smoothed over a window of epochs.

    python -m benchmark.score data            # all runs below data/
    python -m benchmark.score data/ppo_*      # those of PPO

Runs of the same script and environment count as seeds of one experiment. A point of a run's curve is the mean of
`AverageEpRet` over the last `--window` epochs (those in which an episode ended); the curves of the seeds are averaged
point by point, and the best point of the mean is the score. `--save DIR` writes each curve as a small CSV.
"""

import json
import pathlib
import sys
from dataclasses import dataclass

import pandas as pd
import tyro
from tyro.conf import Positional


@dataclass
class Args:
    paths: Positional[tuple[pathlib.Path, ...]]  # run directories, or directories that hold some
    window: int = 10  # epochs in a point of the curve
    save: pathlib.Path | None = None  # directory for CSV files (steps, ret, steps_per_sec), one a run


def main(args):
    runs = {}
    for run_dir in sorted({p.parent for path in args.paths for p in path.rglob("progress.txt")}):
        config = json.loads((run_dir / "config.json").read_text())
        try:
            rows = pd.read_csv(run_dir / "progress.txt", sep="\t")
            finished = rows["TotalEnvInteracts"].iloc[-1] >= config["total_steps"]
        except pd.errors.EmptyDataError:
            finished = False
        if not finished:
            print(f"left out, not finished: {run_dir}", file=sys.stderr)
            continue
        runs.setdefault((config["script"].removesuffix(".py"), config["env_id"]), []).append(rows)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            small = rows[["TotalEnvInteracts", "AverageEpRet", "StepsPerSec"]].round(1)
            small.columns = ["steps", "ret", "steps_per_sec"]
            small.to_csv(args.save / f"{run_dir.name}.csv", index=False)
            (args.save / f"{run_dir.name}.json").write_text(json.dumps(config, indent=1) + "\n")
    print(f"{'algorithm':10}{'environment':16}{'seeds':>6}{'best':>9}{'at step':>11}{'final':>9}   best of each seed")
    for (algo, env_id), seeds in runs.items():
        smooth = pd.DataFrame(
            {i: rows.set_index("TotalEnvInteracts")["AverageEpRet"].rolling(args.window, 1).mean() for i, rows in enumerate(seeds)}
        )
        smooth = smooth.iloc[min(args.window, len(smooth)) - 1 :]
        mean = smooth.mean(axis=1, skipna=False)
        each = ", ".join(f"{best:.0f}" for best in smooth.max())
        print(f"{algo:10}{env_id:16}{len(seeds):6}{mean.max():9.0f}{mean.fillna(-1e9).idxmax():11,}{mean.iloc[-1]:9.0f}   {each}")


if __name__ == "__main__":
    main(tyro.cli(Args))
