"""Score, watch or film the policy of a run.

    python -m utils.evaluate data/ppo_Walker2d-v4/ppo_Walker2d-v4_s0                    # the returns of 10 episodes
    python -m utils.evaluate data/ppo_Walker2d-v4/ppo_Walker2d-v4_s0 --render           # in a window
    python -m utils.evaluate data/ppo_Walker2d-v4/ppo_Walker2d-v4_s0 --video walk.mp4 -n 1

env, act = load_policy("data/ppo_Walker2d-v4/ppo_Walker2d-v4_s0", render_mode="rgb_array")
results = film(env, act, "walk.mp4")

Nothing in the run directory is changed, and nothing in it is executed: the weights are loaded with `weights_only=True`,
and the script whose name stands in config.json is the one of that name next to utils/.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg, create_mutex_group

from utils.logger import check_finite, one_line, read_config, silence_environments
from utils.mpi import RunError

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILMS = {".mp4": (50, 480, 30), ".gif": (25, 240, 10)}  # at most: frames a second, pixels a side, seconds
EITHER = create_mutex_group(required=False)


@dataclass
class Args:
    run_dir: Positional[pathlib.Path]  # directory of a run, with its config.json and model.pt
    episodes: Annotated[int, arg(aliases=["-n"])] = 10  # episodes to run
    len: Annotated[int | None, arg(aliases=["-l"])] = None  # steps after which an episode is cut; default: where it ends
    deterministic: Annotated[bool, arg(aliases=["-d"]), EITHER] = False  # no noise; the default if the script tests so
    no_deterministic: Annotated[bool, EITHER] = False  # the stochastic policy; the default if the script has no tests
    seed: int = 0  # of the environment and the policy's noise
    itr: int | None = None  # epoch of an earlier model, kept by --keep-checkpoints; default: the last model
    render: bool = False  # show the episodes in a window
    video: pathlib.Path | None = None  # film the episodes: name of an .mp4 (the first 30 seconds) or a .gif (10)
    json: bool = False  # print one JSON object and nothing else


class Policy:
    """act(obs): what env.step takes, for one observation (obs_dim,).

    `deterministic` is how the script scores its policy: True if it has test episodes, which are deterministic, and False if
    its score is the return in training. `module` is the ActorCritic.
    """

    def __init__(self, module, deterministic):
        self.module, self.deterministic = module, deterministic

    def __call__(self, obs, deterministic=None):
        deterministic = self.deterministic if deterministic is None else deterministic
        return self.module.act(np.asarray(obs)[None], deterministic=deterministic)[0]


def load_policy(run_dir, itr=None, render_mode=None):
    """The environment and the Policy, on the CPU, of a run; or of its snapshot model_<itr>.pt.

    `render_mode` is Gymnasium's: "human" or "rgb_array". Raises RunError if something is missing, damaged or does not fit.
    """
    run_dir = pathlib.Path(run_dir)
    config = read_config(run_dir) | {"device": "cpu", "resume": None}
    env_id = config.get("env_id")
    if not isinstance(env_id, str):
        raise RunError(f"{run_dir / 'config.json'}: names no environment in env_id")
    weights = _read_weights(run_dir, itr)
    packages = env_id.split(":")[0].split(".") if ":" in env_id else []  # Gymnasium imports each of them
    for place, n in itertools.product(sys.path, range(1, len(packages) + 1)):
        if pathlib.Path(place, *packages[:n]).resolve().is_relative_to(run_dir.resolve()):
            raise RunError(f"{run_dir}: env_id {env_id!r} would execute code of the run directory")
    script = _import_script(config["script"], run_dir)
    if render_mode == "rgb_array":
        _choose_gl()
    try:
        silence_environments()
        fields = {field.name for field in dataclasses.fields(script.Args)}
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in fields}
        args = script.Args(**arguments)
        options = {"render_mode": render_mode} if render_mode else {}  # which not every environment knows
        env = gym.make(env_id, max_episode_steps=args.max_ep_len, disable_env_checker=True, **options)
        with torch.random.fork_rng(devices=[]):
            module = script.ActorCritic(env.observation_space, env.action_space, args)
        module.load_state_dict(weights)
    except Exception as error:  # an environment may raise anything
        gl = f" (MUJOCO_GL is {os.environ['MUJOCO_GL']})" if "MUJOCO_GL" in os.environ and "mujoco" not in sys.modules else ""
        raise RunError(f"{run_dir}: this run of {config['script']} on {env_id} cannot be loaded: {one_line(error)}{gl}") from None
    if render_mode:
        _follow(env)
    return env, Policy(module.eval(), "num_test_episodes" in fields)


def _read_weights(run_dir, itr):
    """The state_dict of the model, or of its snapshot."""
    path = run_dir / ("model.pt" if itr is None else f"model_{itr}.pt")
    if not path.is_file():
        kept = sorted(int(p.stem[6:]) for p in run_dir.glob("model_*.pt") if p.stem[6:].isdecimal())
        there = f"there are {', '.join(map(str, kept))}" if kept else "none was kept (see --keep-checkpoints)"
        raise RunError(f"{run_dir}: has no model.pt yet" if itr is None else f"--itr {itr}: {path} does not exist; {there}")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # torch's own message advises to load without weights_only, which would execute the file
        raise RunError(f"{path}: is no file of weights, or is damaged; it was not loaded") from None


def _import_script(name, run_dir):
    """The module of the file `name` next to utils/, under a name of its own: it may be running as __main__."""
    if pathlib.PureWindowsPath(name).name != name or not name.endswith(".py"):
        raise RunError(f"{run_dir / 'config.json'}: script {name!r} is not the plain name of a Python file")
    if not (ROOT / name).is_file():
        raise RunError(f"{run_dir / 'config.json'}: its script {name} is not in {ROOT}; put it there")
    spec = importlib.util.spec_from_file_location(f"script_of_run.{name[:-3]}", ROOT / name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _choose_gl():
    """Let MuJoCo draw without a window: set MUJOCO_GL to the first of EGL and OSMesa that works, unless it is set.

    Each is tried in a process of its own, as one that fails leaves PyOpenGL unfit for the other.
    """
    if sys.platform != "linux" or "MUJOCO_GL" in os.environ or not importlib.util.find_spec("mujoco"):
        return
    for name in ("egl", "osmesa"):
        probe = [sys.executable, "-c", f"from mujoco.{name} import GLContext; GLContext(16, 16).make_current()"]
        if subprocess.run(probe, env=os.environ | {"MUJOCO_GL": name}, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return


def _follow(env):
    """Look through MuJoCo's camera "track", where the model has one, at a floor without an end; the physics stays the same.

    Gymnasium's own choice of camera does not follow the body, and its floors are drawn only 20 or 40 m far.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer:
        import mujoco

        model = renderer.model
        camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if camera >= 0:
            fixed = dict(type=mujoco.mjtCamera.mjCAMERA_FIXED, fixedcamid=camera)
            renderer.camera_id, renderer.default_cam_config = camera, fixed
            floor = (model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE) & (model.geom_matid >= 0) & model.geom_size[:, :2].all(1)
            model.mat_texrepeat[model.geom_matid[floor]] /= 2 * model.geom_size[floor, :2]  # now per metre
            model.geom_size[floor, :2] = 0  # no end


class Camera:
    """Films `env` to `path`, an .mp4 or a .gif, in the environment's own time. Call it after each reset and step.

    To keep the file small, frames are left out, made smaller, and no longer taken after some seconds.
    """

    def __init__(self, env, path):
        self.env, self.path, self.calls, self.frames = env, pathlib.Path(path), 0, 0
        self.writer, self.images = None, []  # of an .mp4, of a .gif
        if self.path.suffix not in FILMS:
            raise RunError(f"--video {path}: has to end in {' or '.join(FILMS)}")
        if not self.path.absolute().parent.is_dir():
            raise RunError(f"--video {path}: its directory does not exist")
        if env.render_mode != "rgb_array":
            raise RunError(f"--video {path}: {env} draws no pictures; it needs render_mode='rgb_array'")
        max_fps, self.max_pixels, seconds = FILMS[self.path.suffix]
        env_fps = env.metadata.get("render_fps") or 30
        self.every = math.ceil(env_fps / max_fps)
        self.fps = env_fps / self.every
        self.max_frames = int(seconds * self.fps)

    def __call__(self):
        self.calls += 1
        if (self.calls - 1) % self.every == 0 and self.frames < self.max_frames:
            frame = self._draw()
            with self._writing():
                self._write(frame)
            self.frames += 1

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, ImportError) as error:
            raise RunError(f"--video {self.path}: cannot be written: {one_line(error)}") from None

    def _draw(self):
        try:
            with warnings.catch_warnings(action="ignore"):  # of GLFW, which says less than the error
                return self.env.render()  # (height, width, 3)
        except Exception as error:  # OpenGL's libraries fail in many ways
            hint = "; MuJoCo needs EGL or OSMesa: apt install libegl1 libgl1, or libosmesa6"
            hint = hint if hasattr(self.env.unwrapped, "mujoco_renderer") else ""
            raise RunError(f"--video {self.path}: the environment cannot be drawn: {one_line(error)}{hint}") from None

    def _write(self, frame):
        import imageio.v2 as imageio
        from PIL import Image

        scale = min(1, self.max_pixels / max(frame.shape))
        size = [max(1, round(n * scale / 2)) * 2 for n in (frame.shape[1], frame.shape[0])]  # even, as H.264 wants
        image = Image.fromarray(frame).resize(size)
        if self.path.suffix == ".gif":
            self.images.append(image)
            return
        self.writer = self.writer or imageio.get_writer(self.path, fps=self.fps, macro_block_size=2)
        self.writer.append_data(np.asarray(image))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with self._writing():
            if self.images:
                first, *others = self.images  # their duration is stored in hundredths of a second
                first.save(self.path, save_all=True, append_images=others, duration=10 * round(100 / self.fps), loop=0)
            if self.writer:
                self.writer.close()
                if not error:  # a full disk, of which `close` is silent, leaves what cannot be read
                    import imageio.v2 as imageio

                    imageio.get_reader(self.path).close()


def play(env, act, episodes=1, deterministic=None, max_len=None, seed=0, watch=lambda: None):
    """Run episodes; yields the return and the length of each. `watch()` is called after each reset and step.

    Episode k depends on (seed, k) alone, and torch's random state outside is left as it was.
    """
    for k in range(episodes):
        env_seed, torch_seed = map(int, np.random.SeedSequence([seed, k]).generate_state(2))
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            torch.manual_seed(torch_seed)
            (obs, _), ret, length, ended = env.reset(seed=env_seed), 0.0, 0, False
            watch()
            while not ended and length != max_len:
                obs, rew, terminated, truncated, _ = env.step(act(obs, deterministic))
                check_finite(length, observation=obs, reward=rew)
                ret, length, ended = ret + float(rew), length + 1, terminated or truncated
                watch()
        yield ret, length


def film(env, act, path, episodes=1, deterministic=None, max_len=None, seed=0):
    """Run episodes of an environment with render_mode="rgb_array" and film them. Returns a list of (return, length).

    `path` is an .mp4 (at most 30 seconds) or a .gif (10). Raises RunError where nothing can be drawn or written."""
    with Camera(env, path) as camera:
        return list(play(env, act, episodes, deterministic, max_len, seed, camera))


def evaluate(args):
    """What the command line does; returns what --json prints."""
    for name in ("episodes", "len", "seed", "itr"):
        value, least = getattr(args, name), int(name in ("episodes", "len"))
        if value is not None and value < least:
            raise RunError(f"--{name} {value}: has to be at least {least}")
    if args.render and args.video:
        raise RunError("--render and --video: choose one")
    if args.render and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise RunError("--render: there is no display to open a window on; use --video out.mp4")
    mode = "human" if args.render else "rgb_array" if args.video else None
    env, act = load_policy(args.run_dir, args.itr, mode)
    deterministic = args.deterministic or (act.deterministic and not args.no_deterministic)
    rets, lens = [], []
    with Camera(env, args.video) if args.video else contextlib.nullcontext(lambda: None) as watch:
        for ret, length in play(env, act, args.episodes, deterministic, args.len, args.seed, watch):
            print(f"episode {len(rets)}  return {ret:.2f}  length {length}", flush=True)
            rets.append(ret)
            lens.append(length)
    env.close()
    summary = dict(mean=np.mean(rets), std=np.std(rets), min=np.min(rets), max=np.max(rets), mean_length=np.mean(lens))
    summary = {name: float(value) for name, value in summary.items()}
    kind = "deterministic" if deterministic else "stochastic"
    print("  ".join(f"{name} {value:.2f}" for name, value in summary.items()) + f"  ({kind} policy)")
    if args.video:
        print(f"{args.video}: {watch.frames / watch.fps:.1f} s, {args.video.stat().st_size / 1e6:.1f} MB")
    env_id = read_config(args.run_dir)["env_id"]
    run = dict(run_dir=str(args.run_dir), env_id=env_id, itr=args.itr, deterministic=deterministic, seed=args.seed)
    return run | dict(video=args.video and str(args.video), returns=rets, lengths=lens) | summary


if __name__ == "__main__":
    cli_args = tyro.cli(Args, config=(FlagCreatePairsOff,))
    torch.set_num_threads(1)  # a second one gains little for networks of this size
    with contextlib.redirect_stdout(sys.stderr if cli_args.json else sys.stdout):  # environments print too
        result = evaluate(cli_args)
    if cli_args.json:
        print(json.dumps(result))
