"""Training speed next to what the environment alone could do, measured in turn on an otherwise idle machine.

    python -m benchmark.throughput                                            # ppo.py on HalfCheetah-v4
    python -m benchmark.throughput --scripts vpg.py trpo.py ppo.py --torch-threads 1 2

Every repeat times bare `env.step` with random actions (resets included), then each script at its defaults, one after the
other; the table holds the medians over the repeats. A script's speed is `TotalEnvInteracts / Time` of its last row:
acting, stepping, updating, logging and saving, without Python's imports.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import tyro

from utils.logger import silence_environments


@dataclass
class Args:
    scripts: tuple[str, ...] = ("ppo.py",)  # algorithm files
    env_id: str = "HalfCheetah-v4"  # environment of all measurements
    steps: int = 100_000  # environment steps of a script's run
    torch_threads: tuple[int, ...] = (1,)  # threads of torch in the script's process
    repeats: int = 3  # times that everything is measured


def bare_steps_per_sec(env_id, steps=10_000):
    """Speed of `env.step` alone, in this process."""
    env = gym.make(env_id, disable_env_checker=True)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(steps)]
    env.reset(seed=0)
    start = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - start)


def script_steps_per_sec(script, env_id, steps, threads):
    """Speed of a whole training run of `script` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"--env-id {env_id} --total-steps {steps} --torch-threads {threads} --exp-name x --data-dir {folder}"
        subprocess.run([sys.executable, script, *options.split()], check=True, stdout=subprocess.DEVNULL)
        last = pd.read_csv(Path(folder) / "x/x_s0/progress.txt", sep="\t").iloc[-1]
    return last["TotalEnvInteracts"] / last["Time"]


def main(args):
    silence_environments()
    speeds = {}
    for _ in range(args.repeats):
        speeds.setdefault("bare env.step", []).append(bare_steps_per_sec(args.env_id))
        for script in args.scripts:
            for threads in args.torch_threads:
                speed = script_steps_per_sec(script, args.env_id, args.steps, threads)
                speeds.setdefault(f"{script}, {threads} thread{'s' * (threads > 1)}", []).append(speed)
    bare = np.median(speeds["bare env.step"])
    print(f"{args.env_id}, {args.steps:,} steps, medians of {args.repeats}\n{'':24}{'steps/s':>10}{'fraction':>10}   each")
    for name, values in speeds.items():
        median = np.median(values)
        print(f"{name:24}{median:10,.0f}{median / bare:10.3f}   {', '.join(f'{v:,.0f}' for v in values)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
