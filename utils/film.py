"""Films of environments."""

import contextlib
import math
import warnings
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image

from utils.process import RunError, one_line

FILMS = {".mp4": (50, 480, 30), ".gif": (25, 240, 10)}  # at most: frames a second, pixels a side, seconds


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
