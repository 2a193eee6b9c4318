"""The learning benchmark: six algorithms, five environments, 1,000,000 steps, each file's own defaults; and five studies.

    python -m benchmark.mujoco                                                      # all that is missing in benchmark/results
    python -m benchmark.mujoco --scripts ppo.py sac.py --env-ids Hopper-v4 --seeds 0 1
    python -m benchmark.mujoco --suite value-fits
    python -m benchmark.report                                                      # tables and figures

Each finished run leaves its curve (<run>.csv) and its configuration (<run>.json) in --results, or for a study in
benchmark/studies/<suite>. VPG, TRPO and PPO, whose files have no tests, keep a model every 10 epochs; some 50 of them are
tested here as the other three files test theirs, without noise: 5 episodes each, and 10 of the last.

Started again after an interruption, the benchmark goes on where it was: runs whose curve is there with the same arguments
are left out, runs that are finished in --data-dir are kept, and unfinished ones are resumed from their checkpoint. Runs of
other code than the script has now are made anew, with a line that says so; of a study's script only its own file is compared. A
curve whose run is gone keeps no code: delete the curves that a change of the code could have changed. With another --results and
another --data-dir the benchmark is run anew; curves of the studies always go to benchmark/studies. A run of DDPG, TD3 or SAC
takes an hour or more of one core, the others minutes.
"""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from benchmark import score
from benchmark.pool import execute, interruptible
from benchmark.sweep import Args as SweepArgs
from benchmark.sweep import plan
from utils.evaluate import load_policy, play
from utils.process import RunError, available_cores
from utils.run_dir import as_json
from utils.runs import ASIDE

ON_POLICY = ("vpg.py", "trpo.py", "ppo.py")
OFF_POLICY = ("ddpg.py", "td3.py", "sac.py")
ENV_IDS = ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Swimmer-v4", "Ant-v4")
STUDIES = {  # scripts and grid; the first two are exercises 2.1 and 2.2 of OpenAI's Spinning Up
    # the critic of TRPO is not trained at all; the other half of the comparison is in the benchmark itself
    "value-fits": (("trpo.py",), {"env-id": ["Hopper-v4"], "train-v-iters": ["0"], "seed": [*"01234"]}),
    # a smaller network and batch than the defaults, to be quick
    "broadcast": (
        ("ddpg.py", "benchmark/studies/ddpg_no_squeeze.py"),
        {"total-steps": ["100000"], "hidden-sizes": ["300"], "batch-size": ["64"], "seed": ["0", "10", "20"]},
    ),
    # what each addition to the paper gives; the runs are short, and all of a seed come before the next seed's
    "extras": (
        ("benchmark/studies/ppo_without.py",),
        {
            "seed": [*"01234"],
            "env-id": ["HalfCheetah-v4", "Hopper-v4"],
            "total-steps": ["300000"],
            "without": "nothing norm-obs norm-values fresh-advantages lr-decay small-actions orthogonal staggering".split(),
        },
    ),
    # against the benchmark's runs, whose alpha is fixed
    "autotune": (
        ("sac.py",),
        {"env-id": ["HalfCheetah-v4", "Hopper-v4"], "autotune": ["True"], "seed": ["0", "1"]},
    ),
    # against the benchmark's runs, which learn from 10,000 steps on
    "early-updates": (
        ("td3.py",),
        {"seed": ["0", "1"], "env-id": list(ENV_IDS), "update-after": ["1000"]},
    ),
}


@dataclass
class Args:
    suite: Literal["learning", *STUDIES] = "learning"  # the benchmark, or one of its studies
    scripts: tuple[str, ...] = ON_POLICY + OFF_POLICY  # algorithm files of the benchmark
    env_ids: tuple[str, ...] = ENV_IDS  # environments of the benchmark
    seeds: tuple[int, ...] | None = None  # default: 0 to 4 on-policy, 0 and 1 off-policy; in a study its own
    total_steps: int = 1_000_000  # environment steps of a run of the benchmark
    workers: int = available_cores()  # runs at a time, each of one thread
    data_dir: str = "data"  # run directories
    results: Path = Path("benchmark/results")  # curves of the benchmark


def planned(args):
    """The Runs of a suite, first those of the first seed. Raises RunError if a run would refuse its arguments."""
    sweep_args = dict(workers=args.workers, data_dir=args.data_dir, skip_done=True)
    if args.suite != "learning":
        if (args.scripts, args.env_ids, args.total_steps) != (Args.scripts, Args.env_ids, Args.total_steps):
            raise RunError(f"--suite {args.suite}: has scripts, environments and steps of its own")
        scripts, grid = STUDIES[args.suite]
        grid = grid if args.seeds is None else grid | {"seed": list(map(str, args.seeds))}
        return plan(SweepArgs(scripts, exp_name=args.suite, **sweep_args), grid)
    if args.total_steps != Args.total_steps and args.results == Args.results:
        raise RunError(f"--total-steps {args.total_steps}: would take the place of curves of another length; name other --results")
    runs = []
    for script in args.scripts:
        seeds = args.seeds if args.seeds is not None else range(2 if Path(script).name in OFF_POLICY else 5)
        grid = {"env-id": list(args.env_ids), "total-steps": [str(args.total_steps)], "seed": [str(seed) for seed in seeds]}
        grid |= {} if Path(script).name in OFF_POLICY else {"keep-checkpoints": ["True"]}
        runs += plan(SweepArgs((script,), **sweep_args), grid)
    return sorted(runs, key=lambda run: run.seed)


def same_arguments(config, args, but=()):
    """Whether the configuration of a run is that of `args` (an Args of its script), but for the names in `but`."""
    wanted = json.loads(as_json(asdict(args)))
    aside = ASIDE - {"seed"} | set(but)
    return {name: value for name, value in wanted.items() if name not in aside}.items() <= config.items()


def is_kept(run, folder):
    """Whether the curve of a run with the same arguments is in `folder`, with tests if the run's models are to be tested."""
    try:
        config, columns = json.loads((folder / f"{run}.json").read_text()), (folder / f"{run}.csv").read_text().partition("\n")[0]
    except (OSError, ValueError):
        return False
    return same_arguments(config, run.args) and ("test_ret" in columns) >= run.args.keep_checkpoints


def test(run, run_dir):
    """Note in the rows of a Run (of benchmark.score) the mean return of deterministic episodes of the models kept there, of 40 to
    80 if there are more: 5 episodes, and 10 of the last. All begin in the same states."""

    def mean_return(epoch, episodes):
        env, act = load_policy(run_dir, epoch)
        with contextlib.closing(env):
            return np.mean([ret for ret, _ in play(env, act, episodes, deterministic=True)])

    last = run.rows.index[-1]
    epochs = sorted({int(path.stem.removeprefix("model_")) for path in run_dir.glob("model_*.pt")} - {last})
    try:
        rets = {epoch: mean_return(epoch, 5) for epoch in epochs[:: len(epochs) // 40 or 1]} | {last: mean_return(None, 10)}
        run.rows["test_ret"] = run.rows.index.map(rets)
    except RunError as error:
        print(f"not tested, {error}", file=sys.stderr)


def main(args):
    """Returns the exit status: 1 if a run failed."""
    folder = args.results if args.suite == "learning" else Path("benchmark/studies") / args.suite

    def keep(run):
        if run.returncode == 0:
            for finished in score.load(run.run_dir):
                if finished.config.get("keep_checkpoints"):
                    test(finished, run.run_dir)
                score.save(finished, folder, str(run))

    torch.set_num_threads(1)
    runs = planned(args)
    for run in runs:
        if is_kept(run, folder) and not run.outdated and not run.resumes:
            run.returncode = 0
        elif run.returncode == 0:  # finished, but not kept yet
            keep(run)
    execute(runs, args.workers, ended=keep)
    return int(any(run.returncode for run in runs))


if __name__ == "__main__":
    with interruptible("python", "-m", "benchmark.mujoco", *sys.argv[1:]):
        sys.exit(main(tyro.cli(Args)))
