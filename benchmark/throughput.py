"""Training speed, next to peers at the same settings and to what the machine could do. Needs an otherwise idle machine.

    python -m benchmark.throughput                                           # all six files and the peers that are installed
    python -m benchmark.throughput --scripts ppo.py --torch-threads 1 2      # with one and with two threads
    python -m benchmark.throughput --no-peers --ranks                        # without peers and without MPI

Peers: stable-baselines3 (TRPO: sb3-contrib), and SBX, the same algorithms in JAX (pip install stable-baselines3 sb3-contrib
sbx-rl). Every repeat measures everything once, one after the other, each training in a process of its own, pinned to as many
cores as it has threads; the table holds the medians over the repeats, of the ratio to the fastest peer too. A speed is that of
whole training: acting, stepping, storing, updating and logging, from the end of the first epoch (of a warm-up, for peers) on, so
without imports, compiling and first allocations.

`peers' settings` are the networks, batches and updates per step of stable-baselines3's defaults, but networks of (256, 256)
for DDPG and TD3; `own defaults` are the script's. The floor of an update is the time that its matrix products alone take at
the machine's float32 rate, measured on products of the update's own shapes. The last table is of the same run, at the script's
defaults, by 1, 2, 4 ranks, and on-policy with a default batch for each rank, which is another algorithm.
"""

import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
import tyro

from benchmark.mujoco import OFF_POLICY, ON_POLICY
from utils.check import silence_environments
from utils.optim import fast_products

PEERS = {"trpo.py": {"sb3": ("sb3_contrib", "TRPO")}}  # by script and label: package and class
for name in ("PPO", "DDPG", "TD3", "SAC"):
    PEERS[f"{name.lower()}.py"] = {"sb3": ("stable_baselines3", name), "sbx": ("sbx", name)}
PEERS_SETTINGS = {  # of ours, so that both do the same work
    "trpo.py": "--num-envs 1 --steps-per-epoch 2048 --minibatch-size 128 --train-v-iters 10 --cg-iters 15",
    "ppo.py": "--num-envs 1 --steps-per-epoch 2048 --minibatch-size 64 --train-iters 10",
} | dict.fromkeys(OFF_POLICY, "--num-envs 1 --batch-size 256 --hidden-sizes 256 256")
PEERS_SETTINGS["sac.py"] += " --autotune"
PEER_OPTIONS = "policy_kwargs=dict(net_arch=[256, 256]), batch_size=256, train_freq=1, gradient_steps=1"  # off-policy
PEER_PROGRAM = """
import time, torch, gymnasium
from {package} import {name}
torch.set_num_threads({threads})
gymnasium.logger.min_level = gymnasium.logger.ERROR
model = {name}("MlpPolicy", {env_id!r}, device="cpu", seed=0, {options})
model.learn({warm_up})
steps, start = model.num_timesteps, time.perf_counter()
model.learn({steps}, reset_num_timesteps=False)  # on-policy whole rollouts, so more than these
print("speed", (model.num_timesteps - steps) / (time.perf_counter() - start))
"""


@dataclass
class Args:
    scripts: tuple[str, ...] = ON_POLICY + OFF_POLICY  # algorithm files
    env_id: str = "HalfCheetah-v4"  # environment of all measurements
    on_policy_steps: int = 20_000  # environment steps of a run of vpg, trpo, ppo
    off_policy_steps: int = 3000  # environment steps of a run of ddpg, td3, sac
    torch_threads: tuple[int, ...] = (1,)  # threads of torch in the process that trains
    repeats: int = 3  # times that everything is measured
    peers: bool = True  # measure the peers too
    ranks: tuple[int, ...] = (1, 2, 4)  # MPI processes that share a run, for the table of MPI's scaling


def bare_steps_per_sec(env_id, steps=10_000):
    """Speed of `env.step` alone with random actions, resets included, in this process."""
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


def matrix_rate(batch, width=256, repeats=500):
    """float32 operations per second of the products of a hidden layer: forward, and backward by input and by weight."""
    x, w, y = torch.randn(batch, width), torch.randn(width, width), torch.randn(batch, width)
    products = (lambda: x @ w.T, lambda: y @ w, lambda: y.T @ x)
    seconds = sum(min(timeit.repeat(product, number=repeats)) for product in products)
    return 2 * batch * width * width * len(products) * repeats / seconds


def update_operations(script, obs_dim, act_dim, batch, hidden=(256, 256), policy_delay=2):
    """float32 operations of the matrix products in an update of ddpg.py, td3.py (on average) or sac.py."""

    def layers(n_in, n_out):
        sizes = (n_in, *hidden, n_out)
        return [2 * batch * a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True)]

    pi = layers(obs_dim, act_dim * (2 if script == "sac.py" else 1))
    q = layers(obs_dim + act_dim, 1)
    learn = lambda net: 3 * sum(net) - net[0]  # forward, by weight, and by input but for the first layer  # noqa: E731
    through = 2 * sum(q)  # forward, and by input
    critics = 1 if script == "ddpg.py" else 2
    critic_step = sum(pi) + critics * (sum(q) + learn(q))  # the target's policy and critics, and the step
    actor_step = learn(pi) + (2 if script == "sac.py" else 1) * through
    return critic_step + actor_step / (policy_delay if script == "td3.py" else 1)


def pinned(threads):
    """The words that start a command on so many cores."""
    return ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))]


def own_speed(script, env_id, steps, launcher, threads=1, options=""):
    """Steps per second of `script`, which the words of `launcher` start, from the end of its first epoch on."""
    if script in OFF_POLICY:  # all steps but the first with updates, as in the peers' runs
        options += " --steps-per-epoch 500 --start-steps 0 --update-after 256 --num-test-episodes 0"
    with tempfile.TemporaryDirectory() as folder:
        words = f"--env-id {env_id} --total-steps {steps} --torch-threads {threads} --exp-name x --data-dir {folder} {options}"
        subprocess.run([*launcher, sys.executable, script, *words.split()], check=True, stdout=subprocess.DEVNULL)
        rows = pd.read_csv(Path(folder) / "x/x_s0/progress.txt", sep="\t")
    first, last = rows.iloc[0], rows.iloc[-1]
    return (last["TotalEnvInteracts"] - first["TotalEnvInteracts"]) / (last["Time"] - first["Time"])


def batch_per_rank(script, ranks):
    """Options that give each rank the work of a single process: `ranks` times the default environments and batches."""
    Args = importlib.import_module(Path(script).stem).Args
    sizes = [name for name in ("num_envs", "steps_per_epoch", "minibatch_size") if hasattr(Args, name)]
    return " ".join(f"--{name.replace('_', '-')} {ranks * getattr(Args, name)}" for name in sizes)


def peer_speed(script, label, env_id, steps, threads):
    """Steps per second of a peer of `script`, after a warm-up."""
    package, name = PEERS[script][label]
    warm_up, options = (500, PEER_OPTIONS) if script in OFF_POLICY else (2048, "")
    values = dict(package=package, name=name, env_id=env_id, threads=threads, warm_up=warm_up, options=options)
    command = [*pinned(threads), sys.executable, "-c", PEER_PROGRAM.format(steps=steps - 500, **values)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.rpartition("speed")[2])


def main(args):
    silence_environments()
    torch.set_num_threads(1)
    fast_products(256)  # as in the runs
    packages = {package for peers in PEERS.values() for package, _ in peers.values()}
    missing = {package for package in packages if args.peers and not importlib.util.find_spec(package)}
    for package in sorted(missing):
        print(f"left out, not installed: {package}", file=sys.stderr)
    if args.ranks and not shutil.which("mpirun"):
        print("left out, MPI, as there is no mpirun; pip install mpich", file=sys.stderr)
        args.ranks = ()
    measured, rates = {}, []

    def measure(key, speed):
        measured.setdefault(key, []).append(speed)
        print(f"{' '.join(map(str, key))}: {speed:,.0f}", file=sys.stderr, flush=True)

    for _ in range(args.repeats):
        measure(("bare env.step", "", 1), bare_steps_per_sec(args.env_id))
        rates.append(matrix_rate(256))
        for script in args.scripts:
            steps = args.off_policy_steps if script in OFF_POLICY else args.on_policy_steps
            for threads in args.torch_threads:
                for label, (package, _) in PEERS.get(script, {}).items() if args.peers else ():
                    if package not in missing:
                        measure((script, label, threads), peer_speed(script, label, args.env_id, steps, threads))
                own = (script, args.env_id, steps, pinned(threads), threads)
                if script in PEERS_SETTINGS:
                    measure((script, "peers' settings", threads), own_speed(*own, PEERS_SETTINGS[script]))
                measure((script, "own defaults", threads), own_speed(*own))
            for ranks in args.ranks:
                own = (script, args.env_id, steps, ["mpirun", "-n", str(ranks)])
                measure((script, "mpirun", ranks), own_speed(*own))
                if script in ON_POLICY and ranks > 1:
                    measure((script, "a batch each", ranks), own_speed(*own, options=batch_per_rank(script, ranks)))

    median = {key: np.median(values) for key, values in measured.items()}
    bare, rate = median["bare env.step", "", 1], np.median(rates)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "gymnasium", "mujoco"))
    limits = f"bare env.step {bare:,.0f}/s, float32 {rate / 1e9:.0f} GFLOP/s"
    print(f"{args.env_id}, medians of {args.repeats}, {versions}; {limits}")
    head = f"{'':9}{'settings':17}{'threads':>8}{'steps/s':>9}{'of bare':>9}"
    print(f"{head}{'fastest peer':>14}{'ratio':>7}{'of floor':>10}")
    env = gym.make(args.env_id)
    for (script, settings, threads), speed in median.items():
        if settings in ("", "mpirun", "a batch each"):
            continue
        line = f"{script:9}{settings:17}{threads:8}{speed:9,.0f}{speed / bare:9.3f}"
        keys = {label: (script, label, threads) for label in PEERS.get(script, {})}
        peers = {median[key]: label for label, key in keys.items() if key in median}
        if settings == "peers' settings" and peers:
            label = peers[max(peers)]
            ratios = np.divide(measured[script, settings, threads], measured[keys[label]])
            line += f"{label:>14}{np.median(ratios):7.2f}"
            if script in OFF_POLICY and threads == 1:
                dims = env.observation_space.shape[0], env.action_space.shape[0]
                line += f"{speed * update_operations(script, *dims, 256) / rate:10.2f}"
        print(line)
    if args.ranks:
        print(f"\nmpirun -n, {os.cpu_count()} cores: steps/s, and times that of -n {args.ranks[0]}; at the script's defaults,")
        print(f"and with the default batch and environments for each rank\n{'':22}" + "".join(f"{r:16}" for r in args.ranks))
    for script, kind in itertools.product(args.scripts if args.ranks else (), ("mpirun", "a batch each")):
        speed = [median.get((script, kind, r), median[script, "mpirun", r]) for r in args.ranks]
        if kind == "mpirun" or script in ON_POLICY:
            print(f"{script:9}{kind:13}" + "".join(f"{v:10,.0f}{f'({v / speed[0]:.2f})':>6}" for v in speed))


if __name__ == "__main__":
    main(tyro.cli(Args))
