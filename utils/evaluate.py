"""Score, watch or film the policy of a run.

    python -m utils.evaluate data/ppo_Walker2d-v4/ppo_Walker2d-v4_s0                    # the returns of 10 episodes
    python -m utils.evaluate data/ppo_Walker2d-v4/ppo_Walker2d-v4_s0 --render           # in a window
    python -m utils.evaluate data/ppo_Walker2d-v4/ppo_Walker2d-v4_s0 --video walk.mp4 -n 1

env, act = load_policy("data/ppo_Walker2d-v4/ppo_Walker2d-v4_s0", render_mode="rgb_array")
results = list(play(env, act, video="walk.mp4"))  # returns and lengths

Nothing in the run directory is changed, and nothing in it is executed: the weights are loaded with `weights_only=True`,
and the script whose name stands in config.json is the one of that name next to utils/, or in a folder there.
"""

import contextlib
import ctypes.util
import importlib.util
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import imageio.v2 as imageio
import numpy as np
import torch
import tyro
from PIL import Image
from tyro.conf import FlagCreatePairsOff, Positional, arg, create_mutex_group

from utils.args import AtLeast0, AtLeast1
from utils.check import check_ranges, silence_environments
from utils.envs import check_finite, make_env
from utils.process import RunError, one_line
from utils.run_dir import read_config, same_code

ROOT = Path(__file__).resolve().parent.parent
FILMS = {".mp4": (50, 480, 30), ".gif": (25, 240, 10)}  # at most: frames a second, pixels a side, seconds
EITHER = create_mutex_group(required=False)


@dataclass
class Args:
    run_dir: Positional[Path]  # directory of a run, with its config.json and model.pt
    episodes: Annotated[AtLeast1, arg(aliases=["-n"])] = 10  # episodes to run
    len: Annotated[AtLeast1 | None, arg(aliases=["-l"])] = None  # steps after which an episode is cut; default: where it ends
    deterministic: Annotated[bool, arg(aliases=["-d"]), EITHER] = False  # no noise; the default if the script tests so
    no_deterministic: Annotated[bool, EITHER] = False  # the stochastic policy; the default if the script has no tests
    seed: AtLeast0 = 0  # of the environment and the policy's noise
    itr: int | None = None  # epoch of an earlier model, kept by --keep-checkpoints; default: the last model
    render: bool = False  # show the episodes in a window
    video: Path | None = None  # film the episodes: name of an .mp4 (the first 30 seconds) or a .gif (10)
    json: bool = False  # print one JSON object and nothing else


@dataclass
class Policy:
    """act(obs): what env.step takes, for one observation (obs_dim,)."""

    module: torch.nn.Module  # the ActorCritic
    deterministic: bool  # as the script scores it: True if it has test episodes, False if by the return in training

    def __call__(self, obs, deterministic=None):
        deterministic = self.deterministic if deterministic is None else deterministic
        return self.module.act(np.asarray(obs)[None], deterministic=deterministic)[0]


def load_policy(run_dir, itr=None, render_mode=None):
    """The environment and the Policy, on the CPU, of a run; or of its snapshot model_<itr>.pt.

    `render_mode` is Gymnasium's: "human" or "rgb_array". Raises RunError if something is missing, damaged or does not fit.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir) | {"device": "cpu", "resume": None}
    env_id, name = str(config.get("env_id")), config["script"]
    weights_path = run_dir / ("model.pt" if itr is None else f"model_{itr}.pt")
    try:
        weights = torch.load(weights_path, weights_only=True, map_location="cpu")
    except Exception:  # torch's own message advises to load without weights_only, which would execute the file
        there = ", ".join(sorted(p.name for p in run_dir.glob("model*.pt"))) or "no model yet"
        what = "is damaged, or no file of weights: it was not loaded" if weights_path.is_file() else "does not exist"
        raise RunError(f"{weights_path} {what}; there is {there} (--keep-checkpoints keeps more than the last)") from None
    paths = [p for folder in ("", "*/", "*/*/") for p in ROOT.glob(f"{folder}*.py") if p.name == name]  # the last is a study's
    paths = [p for p in paths if not any((ROOT / d / "config.json").exists() for d in p.relative_to(ROOT).parents)]
    path = min(paths, key=lambda path: not same_code(run_dir, path), default=None)  # where two have its name, the run's
    if path is None:
        raise RunError(f"{run_dir / 'config.json'}: its script {name!r} is no Python file in {ROOT}; put it there")
    if not same_code(run_dir, path):
        print(f"{path}: is not the code of this run, which is kept in {run_dir / name}", file=sys.stderr)
    libraries = [name for name in ("EGL", "OSMesa") if ctypes.util.find_library(name)]
    if render_mode == "rgb_array" and sys.platform == "linux" and libraries:  # MuJoCo then draws without a window
        os.environ.setdefault("MUJOCO_GL", libraries[0].lower())
    try:
        script = import_script(path)
        silence_environments()
        names = {field.name for field in fields(script.Args)}  # of which older and newer versions may have others
        args = script.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names})
        options = {"render_mode": render_mode} if render_mode else {}  # which not every environment knows
        env = make_env(env_id, args.max_ep_len, **options)
        with torch.random.fork_rng(devices=[]):
            module = script.ActorCritic(env.observation_space, env.action_space, args)
        module.load_state_dict(weights)
    except Exception as error:  # an environment may raise anything
        raise RunError(f"{run_dir}: this run of {name} on {env_id} cannot be loaded: {one_line(error)}") from None
    if render_mode:
        follow(env)
    return env, Policy(module.eval(), "num_test_episodes" in names)


def import_script(path):
    """The module of an algorithm file, under a name of its own: it may be running as __main__."""
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def follow(env):
    """Look through MuJoCo's camera "track", as Gymnasium would not, at a floor without end; the physics stays the same."""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is None:
        return
    import mujoco

    model = renderer.model
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    if camera >= 0:
        renderer.camera_id = camera
        renderer.default_cam_config = dict(type=mujoco.mjtCamera.mjCAMERA_FIXED, fixedcamid=camera)  # that of a window
        floor = (model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE) & (model.geom_matid >= 0) & model.geom_size[:, :2].all(1)
        model.mat_texrepeat[model.geom_matid[floor]] /= 2 * model.geom_size[floor, :2]  # now per metre
        model.geom_size[floor, :2] = 0  # no end


class Camera:
    """Films `env` to `path`, an .mp4 or a .gif, in the environment's own time. Call it after each reset and step.

    To keep the file small, frames are left out, made smaller, and no longer taken after some seconds.
    """

    def __init__(self, env, path):
        self.env, self.path, self.calls, self.writer = env, Path(path), 0, None
        kind = self.path.suffix.lower()
        if kind not in FILMS or not self.path.absolute().parent.is_dir():
            raise RunError(f"--video {path}: has to end in {' or '.join(FILMS)}, in a directory that exists")
        if env.render_mode != "rgb_array":
            raise RunError(f"--video {path}: {env} draws no pictures; it needs render_mode='rgb_array'")
        max_fps, self.max_pixels, seconds = FILMS[kind]
        self.env_fps = env.metadata.get("render_fps") or 30
        self.every = math.ceil(self.env_fps / max_fps)
        self.max_calls, fps = seconds * self.env_fps, self.env_fps / self.every
        gif = dict(duration=10 * round(100 / fps), loop=0)  # in ms, of which a .gif stores the tens
        self.options = gif if kind == ".gif" else dict(fps=fps, macro_block_size=2)

    @contextlib.contextmanager
    def _errors_in_one_line(self):
        hint = "; MuJoCo needs EGL or OSMesa: apt install libegl1 libgl1, or libosmesa6 and MUJOCO_GL=osmesa"
        hint = hint if hasattr(self.env.unwrapped, "mujoco_renderer") and not self.writer else ""
        try:
            with warnings.catch_warnings(action="ignore"):  # of GLFW, which says less than the error
                yield
        except Exception as error:  # OpenGL's libraries fail in many ways
            raise RunError(f"--video {self.path}: cannot be filmed: {one_line(error)}{hint}") from None

    def __call__(self):
        if self.calls % self.every == 0 and self.calls < self.max_calls:
            with self._errors_in_one_line():
                picture = Image.fromarray(self.env.render())  # (height, width, 3)
                picture.thumbnail((self.max_pixels, self.max_pixels))
                self.writer = self.writer or imageio.get_writer(self.path, **self.options)
                self.writer.append_data(np.asarray(picture))
        self.calls += 1

    def close(self):
        """Complete the file."""
        if self.writer:
            with self._errors_in_one_line():
                self.writer.close()


def play(env, act, episodes=1, deterministic=None, max_len=None, seed=0, video=None):
    """Run episodes of an environment of `load_policy` or `make_env`; yields the return and the length of each.

    `video`, the name of an .mp4 (at most 30 seconds) or a .gif (10), needs render_mode="rgb_array"; it is complete after the last
    episode. Episode k depends on (seed, k) alone, and torch's random state outside stays. Raises RunError where it cannot film.
    """
    with contextlib.closing(Camera(env, video)) if video else contextlib.nullcontext(lambda: None) as watch:
        for k in range(episodes):
            env_seed, torch_seed = map(int, np.random.SeedSequence([seed, k]).generate_state(2))
            with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
                torch.manual_seed(torch_seed)
                (obs, _), ended = env.reset(seed=env_seed), False
                watch()
                while not ended and env.ep_len != max_len:
                    obs, rew, terminated, truncated, _ = env.step(act(obs, deterministic))
                    check_finite(env.ep_len - 1, observation=obs, reward=rew)
                    ended = terminated or truncated
                    watch()
            yield env.ep_ret, env.ep_len


def evaluate(args):
    """What the command line does; returns what --json prints."""
    check_ranges(args)
    if args.render and args.video:
        raise RunError("--render and --video: choose one")
    if args.render and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise RunError("--render: there is no display to open a window on; use --video out.mp4")
    mode = "human" if args.render else "rgb_array" if args.video else None
    env, act = load_policy(args.run_dir, args.itr, mode)
    deterministic = args.deterministic or (act.deterministic and not args.no_deterministic)
    rets, lens = [], []
    for ret, length in play(env, act, args.episodes, deterministic, args.len, args.seed, args.video):
        print(f"episode {len(rets)}  return {ret:.2f}  length {length}", flush=True)
        rets.append(ret)
        lens.append(length)
    env.close()
    summary = dict(mean=np.mean(rets), std=np.std(rets), min=np.min(rets), max=np.max(rets), mean_length=np.mean(lens))
    kind = "deterministic" if deterministic else "stochastic"
    print("  ".join(f"{name} {value:.2f}" for name, value in summary.items()) + f"  ({kind} policy)")
    if args.video:
        print(f"{args.video}: {args.video.stat().st_size / 1e6:.1f} MB")
    result = dict(run_dir=str(args.run_dir), env_id=read_config(args.run_dir)["env_id"], itr=args.itr, seed=args.seed)
    result |= dict(deterministic=deterministic, video=args.video and str(args.video), returns=rets, lengths=lens)
    return result | summary


if __name__ == "__main__":
    cli_args = tyro.cli(Args, config=(FlagCreatePairsOff,))
    torch.set_num_threads(1)  # a second one gains little for networks of this size
    if cli_args.json:
        stdout = os.dup(1)
        os.dup2(2, 1)  # whatever else is printed, by a C library too, goes to stderr
    result = evaluate(cli_args)
    if cli_args.json:
        with open(stdout, "w") as file:
            print(json.dumps(result), file=file)
