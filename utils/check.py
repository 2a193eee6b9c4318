"""What is refused before work starts."""

import contextlib
import math
import re
import sys
import typing
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from utils import mpi
from utils.args import Range, Total
from utils.process import RunError, one_line, say


def check_ranges(args, **parts):
    """Refuse numbers outside the ranges that their types declare. `parts`: how many ranks and environments share the totals."""
    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        given = getattr(args, name)
        shown = f"--{name.replace('_', '-')} {' '.join(map(str, given)) if isinstance(given, tuple | list) else given}"
        for value, rule in _rules(hint, given):
            if isinstance(rule, Range) and not rule.holds(value):
                raise RunError(f"{shown}: has to be {rule.text}")
            n = parts[rule.parts] if isinstance(rule, Total) else 1
            if n > 1 and value % n and not (rule.or_one_each and value < n):
                nearest = " or ".join(str(k * n) for k in (value // n, value // n + 1) if k)
                raise RunError(f"{shown}: is not a multiple of the number of {rule.parts}, {n}; try {nearest}")


def check(args, ranks=None):
    """Refuse what a run of `ranks` processes (default: as many as there are) could not do.

    The types of the arguments say their ranges, `args.action_spaces` which spaces the algorithm can handle. Completes
    `args.env_id` by the newest version. Raises RunError with one line that says what to do.
    """
    ranks = ranks or mpi.size()
    check_ranges(args, ranks=ranks, environments=max(getattr(args, "num_envs", 1), ranks))
    if args.exp_name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+=,-]*", args.exp_name):
        raise RunError(f"--exp-name {args.exp_name!r}: use letters, digits and _ . + = , - only, and begin with no sign")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {args.device}: {one_line(error)}") from None
    _check_env(args)


def _rules(hint, value):
    """Pairs of a value and a rule in its type, which may be `X | None` or tuple[X, ...] too."""
    if typing.get_origin(hint) is typing.Annotated:
        return [(value, rule) for rule in hint.__metadata__] + _rules(hint.__origin__, value)
    values = value if isinstance(value, tuple | list) else [value] * (value is not None)
    return [pair for inner in typing.get_args(hint) for v in values for pair in _rules(inner, v)]


def silence_environments():
    """Drop two warnings that nobody here can mend: that v4 is out of date, and of an attribute in MuJoCo's models."""
    gym.logger.min_level = gym.logger.ERROR
    with contextlib.suppress(ImportError, AttributeError):  # not installed, or too old to warn
        import mujoco

        mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(f"MuJoCo: {text}", file=sys.stderr))


def _check_env(args):
    silence_environments()
    flag = f"--env-id {args.env_id}"
    try:
        env = gym.make(args.env_id)
    except (gym.error.Error, ImportError, ValueError) as error:
        raise RunError(f"{flag}: {one_line(error)}") from None
    obs_space, act_space, limit = env.observation_space, env.action_space, env.spec.max_episode_steps
    args.env_id = args.env_id[: args.env_id.rfind(":") + 1] + env.spec.id
    env.close()
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        raise RunError(f"{flag}: its observations are {obs_space}, no flat Box; register it with wrappers.FlattenObservation")
    flat_box = isinstance(act_space, gym.spaces.Box) and len(act_space.shape) == 1 and act_space.dtype.kind == "f"
    if not isinstance(act_space, args.action_spaces) or not (flat_box or isinstance(act_space, gym.spaces.Discrete)):
        who = "all scripts can handle a float Box of shape (n,); vpg.py, trpo.py and ppo.py Discrete, too"
        raise RunError(f"{flag}: this algorithm cannot handle its action space {act_space}; {who}")
    if not hasattr(args, "replay_size"):
        return
    if flat_box and not (np.abs(np.float64((act_space.low, act_space.high))) < 1e30).all():  # float32 holds their distance, too
        raise RunError(f"{flag}: needs bounded actions, not {act_space}; vpg.py, trpo.py and ppo.py can do without")
    total = math.ceil(args.total_steps / args.steps_per_epoch) * args.steps_per_epoch
    names = "update_after", "start_steps", "num_test_episodes"  # which a copied script may do without
    after, start, tests = (getattr(args, name, None) or 0 for name in names)
    size = min(args.replay_size, total)
    needed = 4 * (2 * obs_space.shape[0] + math.prod(act_space.shape) + 2) * size / 2**30
    meminfo = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    free = min((int(kib) / 2**20 for kib in re.findall(r"MemAvailable: +(\d+)", meminfo)), default=math.inf)  # GiB
    if needed > free:
        smaller = int(float(f"{0.8 * free / needed * size:.1e}"))
        text = f"needs {needed:.1f} GiB of memory, of which {free:.1f} GiB are free; try --replay-size {smaller}"
        raise RunError(f"--replay-size {args.replay_size}: {text}")
    endless = tests and args.max_ep_len is None and limit is None
    warnings = {
        f"--start-steps {start}: all {total} steps will be random": start >= total,
        f"--update-after {after}: no update in {total} steps": after > total,
        f"{args.env_id} has no limit of steps: a test may never end; see --max-ep-len": endless,
    }
    for text in warnings:
        if warnings[text] and mpi.rank() == 0:
            say(f"warning: {text}", sys.stderr)
