"""Environments that count their episodes, and that `--resume` can bring back to where they were."""

import functools
import sys
import zlib

import gymnasium as gym
import numpy as np

from utils.process import RunError, say
from utils.state import state_functions

say_once = functools.cache(say)


class Episodes(gym.Wrapper):
    """Counts the episode: `obs` is the last observation, `ep_ret` the return (a Python float) and `ep_len` the steps so far.
    `cut`, if not 0, is the number of steps after which this one episode is truncated.

    It remembers how the episode began and the actions since. Repeated, they bring back an environment that draws its random
    numbers from `np_random` and carries nothing else from one episode to the next.
    """

    def __init__(self, env):
        super().__init__(env)
        self.begun, self.actions, self.obs, self.ep_ret, self.ep_len, self.cut = None, [], None, 0.0, 0, 0

    def reset(self, *, seed=None, options=None):
        functions = state_functions(getattr(self.unwrapped, "np_random", None)) if seed is None else None
        self.begun = (seed, functions and functions[0]())
        self.actions, self.ep_ret, self.ep_len, self.cut = [], 0.0, 0, 0
        obs, info = self.env.reset(seed=seed, options=options)
        self.obs = np.asarray(obs)
        return self.obs, info

    def step(self, action):
        if self.ep_len < 100_000:  # an endless episode does not fill the memory; --resume gives it up
            self.actions.append(np.copy(action))
        obs, rew, terminated, truncated, info = self.env.step(action)
        rew = float(rew) if isinstance(rew, float) else float(np.asarray(rew).item())  # of one element, whatever its type
        terminated = terminated if isinstance(terminated, bool) else bool(np.asarray(terminated).item())
        self.obs, self.ep_ret, self.ep_len = np.asarray(obs), self.ep_ret + rew, self.ep_len + 1
        return self.obs, rew, terminated, bool(truncated) or self.ep_len == self.cut, info

    def state_dict(self):
        episode = dict(obs=self.obs, ep_ret=self.ep_ret, ep_len=self.ep_len, cut=self.cut)
        return dict(begun=self.begun, actions=np.array(self.actions), **episode)

    def load_state_dict(self, state):
        """Repeat the episode; one that comes to another observation or return, or to an error, is given up for a new one."""
        begun = state["begun"]
        if begun is None:  # never reset
            return
        try:
            self.reset(seed=begun[0] or 0)
            if begun[0] is None:
                state_functions(self.unwrapped.np_random)[1](begun[1])
                self.reset()
            for action in state["actions"]:
                self.step(action)
            same = np.array_equal(self.obs, state["obs"]) and (self.ep_ret, self.ep_len) == (state["ep_ret"], state["ep_len"])
            self.cut = state["cut"]
        except Exception:  # whatever an environment raises
            same = False
        if not same:
            say_once(f"{self.spec.id} cannot be brought back to the middle of its episode: a new one begins", sys.stderr)
            self.reset(seed=zlib.crc32(np.asarray(state["obs"]).tobytes()))


def make_env(env_id, max_ep_len=None, **options):
    """Gymnasium's environment as Episodes; `max_ep_len` takes the place of its own limit of steps in an episode."""
    return Episodes(gym.make(env_id, max_episode_steps=max_ep_len, disable_env_checker=True, **options))


def check_finite(step, **arrays):
    """Stop the run if one of the arrays holds a NaN or an infinity; names the quantity and the step."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise RunError(f"{name} is not finite at step {step:,}")
