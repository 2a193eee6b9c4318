"""A run on the disk: its directory, configuration, code, rows, model and checkpoints. Each file is there whole or not at all.

Nothing in a run directory is ever executed.
"""

import ast
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys

import torch

from utils import mpi
from utils.display import Tracker
from utils.process import RunError, one_line, say
from utils.state import GENERATORS


@contextlib.contextmanager
def writing(path):
    """A binary file that takes the place of `path` when it is complete and on the disk. Raises RunError if it cannot."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:  # of a full disk torch says RuntimeError, of what cannot be saved State says TypeError
        raise RunError(f"cannot write {path}: {one_line(error)}; the one before is left as it was") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def as_json(x, **options):
    """JSON of data in which NumPy's numbers and paths may be, too."""
    return json.dumps(x, default=lambda x: x.tolist() if hasattr(x, "tolist") else os.fspath(x), **options)


def read_config(run_dir):
    """config.json of a run directory, as a dict. Raises RunError if there is none that can be read."""
    path = pathlib.Path(run_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {one_line(error)}; is {run_dir} a run directory?") from None
    if not isinstance(config, dict) or not isinstance(config.get("script"), str):
        raise RunError(f"{path}: not the configuration of a run")
    packages = str(config.get("env_id")).rpartition(":")[0].split(".")  # which Gymnasium would import
    for place, n in itertools.product(sys.path, range(1, len(packages) + 1)):
        if packages[0] and pathlib.Path(place, *packages[:n]).resolve().is_relative_to(pathlib.Path(run_dir).resolve()):
            raise RunError(f"{path}: env_id {config['env_id']!r} would execute code of the run directory")
    return config


def same_code(run_dir, script):
    """Whether `script` has the syntax tree of the run's copy, and no other code went on with the run; or there is no copy."""
    copy = pathlib.Path(run_dir) / pathlib.Path(script).name
    if not copy.exists():
        return True
    try:
        trees = [ast.dump(ast.parse(pathlib.Path(path).read_bytes())) for path in (copy, script)]
    except Exception:  # whatever ast thinks of it
        return False
    return trees[0] == trees[1] and not any(again.get("other_code") for again in read_config(run_dir).get("resumed", []))


def provenance(script):
    """What it takes to repeat a run besides its arguments."""
    git = ["git", "-C", str(pathlib.Path(script).resolve().parent)]
    options = dict(capture_output=True, text=True, check=True)
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        commit += "-dirty" * bool(subprocess.run([*git, "status", "--porcelain", "--", ":/*.py"], **options).stdout)
    except (OSError, subprocess.CalledProcessError):
        commit = None
    names = [name for name in ("torch", "numpy", "gymnasium", "mujoco") if name in sys.modules]
    versions = {name: getattr(sys.modules[name], "__version__", None) for name in names}
    run = dict(script=pathlib.Path(script).name, command=shlex.join(sys.argv), ranks=mpi.size(), git_commit=commit)
    return run | dict(threads=torch.get_num_threads(), versions=dict(python=platform.python_version()) | versions)


def make_run_dir(args, exp_name):
    """Make and return <data_dir>/<exp_name>/<exp_name>_s<seed>, or the first free one of ..._1, ..._2 and so on."""
    parent = pathlib.Path(args.data_dir).expanduser() / exp_name
    for k in itertools.count():
        path = parent / (f"{exp_name}_s{args.seed}" + (f"_{k}" if k else ""))
        try:
            path.mkdir(parents=True)
            return path
        except OSError as error:
            if not os.path.lexists(path):  # else the next one
                raise RunError(f"--data-dir {args.data_dir}: cannot make {path}: {error.strerror}") from None


class RunDir:
    """The directory `path` of a run, new or to resume. Rank 0 writes; of the checkpoints each rank has its own."""

    def __init__(self, args, script):
        self.args, self.script, self.rows, self.columns, self.saves = args, pathlib.Path(script), [], [], 0
        self.tracker, self.lock, self.code = None, None, self.script.read_bytes()
        now = mpi.gather(mpi.rank() == 0 and provenance(script))[0]
        if args.resume is None:
            name = args.exp_name or re.sub(r"[^A-Za-z0-9_.+=,-]", "-", f"{self.script.stem}_{args.env_id}")
            self.path = mpi.gather(mpi.rank() == 0 and make_run_dir(args, name))[0]
            self.config = dataclasses.asdict(args) | now
            return
        self.path = pathlib.Path(args.resume)
        self.config = dataclasses.asdict(args) | read_config(self.path)
        if self.config["script"] != self.script.name:
            raise RunError(f"--resume {self.path}: made by {self.config['script']}, not by {self.script.name}")
        if self.config.get("ranks") != mpi.size():
            raise RunError(f"--resume {self.path}: the run has {self.config.get('ranks')} ranks, not {mpi.size()}")
        again = {name: now[name] for name in ("versions", "git_commit")}
        again |= {} if same_code(self.path, script) else dict(other_code=True)
        if "other_code" in again and mpi.rank() == 0:
            say(f"{script} is not the code of all of this run; its first is {self.path / self.script.name}", sys.stderr)
        self.config |= dict(total_steps=args.total_steps, resumed=[*self.config.get("resumed", []), again])

    def open(self):
        """Begin to write."""
        if mpi.rank() > 0:
            return
        if self.args.resume is None:
            self.write(self.script.name, self.code)
        self._lock()
        if self.args.track:
            self.tracker = Tracker(self.args, self.config, self.path)
            self.config["wandb_id"] = self.tracker.run.id
        self._write_config(finished=False)
        if self.rows:  # those after the checkpoint will come again
            self.write("progress.txt", self._table(self.columns, self.rows))

    def _lock(self):
        """Keep other processes from resuming this run; the lock ends with `close` or with the process."""
        try:
            import fcntl

            copy = self.path / self.script.name  # a file, which NFS locks for all its machines
            if self.lock is None:  # 0 where stdin is closed
                self.lock = os.open(copy, os.O_RDWR) if os.access(copy, os.W_OK) else os.open(self.path, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"--resume {self.path}: this run is still going on, in another process") from None
        except (ImportError, OSError):
            pass  # Windows, and file systems that cannot lock

    def write(self, name, data):
        with writing(self.path / name) as file:
            file.write(data)

    def _write_config(self, finished):
        self.config["finished"] = finished
        self.write("config.json", (as_json(self.config, indent=2) + "\n").encode())

    def _table(self, columns, rows):
        lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
        return "".join("\t".join(cells) + "\n" for cells in lines).encode()

    def write_row(self, row):
        """Add a dict of numbers to progress.txt, which is written anew where the row has new columns."""
        self.rows.append({name: str(value) for name, value in row.items()})
        if not set(row) <= set(self.columns):
            self.columns = [*dict.fromkeys([*row, *self.columns])]
            self.write("progress.txt", self._table(self.columns, self.rows))
        else:
            try:
                with open(self.path / "progress.txt", "ab") as file:
                    file.write(self._table(self.columns, self.rows[-1:]).partition(b"\n")[2])
            except OSError as error:
                raise RunError(f"cannot write {self.path / 'progress.txt'}: {error.strerror}") from error
        if self.tracker:
            self.tracker("log", {name: x for name, x in row.items() if x != ""}, step=row["TotalEnvInteracts"])

    def save(self, module, keep, state, info):
        """Write the weights to model.pt, if `keep` to model_<epoch>.pt too, and the State and `info` to this rank's checkpoint."""
        if mpi.rank() == 0:
            with writing(self.path / "model.pt") as file:
                torch.save({name: tensor.cpu() for name, tensor in module.state_dict().items()}, file)
            if keep:
                self.write(f"model_{info['epoch'] - 1}.pt", (self.path / "model.pt").read_bytes())
        info = info | dict(rows=(self.columns, self.rows), random=[get() for get, _ in GENERATORS])
        with writing(self.path / f"checkpoint/{self.saves + 1}_rank{mpi.rank()}.ckpt") as file:
            state.write(file, info)
        mpi.average(0.0)  # waits for all ranks
        self.saves += 1
        for path in (self.path / "checkpoint").glob(f"*_rank{mpi.rank()}.ckpt*"):
            if path.name != f"{self.saves}_rank{mpi.rank()}.ckpt":
                path.unlink(missing_ok=True)

    def restore(self, state):
        """Bring State, random generators and rows back to the newest checkpoint that all ranks have; returns `info`."""
        if mpi.rank() == 0:
            self._lock()
        folder = self.path / "checkpoint"
        numbers = {int(path.name.partition("_")[0]) for path in folder.glob("[0-9]*_rank*.ckpt")}
        complete = [n for n in numbers if all((folder / f"{n}_rank{rank}.ckpt").exists() for rank in range(mpi.size()))]
        if not complete:
            raise RunError(f"--resume {self.path}: {folder} holds no checkpoint; start a new run")
        self.saves = max(numbers)  # above a half one, of which this run would come to write the other half
        path = folder / f"{max(complete)}_rank{mpi.rank()}.ckpt"
        try:
            with open(path, "rb") as file:
                info = state.read(file, self.args.total_steps)
                self.columns, self.rows = info["rows"]
        except Exception as error:  # whatever a broken or foreign file brings about
            raise RunError(f"--resume {self.path}: cannot use {path}: {one_line(error)}; start a new run") from error
        for (_, put), states in zip(GENERATORS, info["random"], strict=True):
            put(states)
        return info

    def finish(self):
        """Note in config.json that all steps are done."""
        if mpi.rank() == 0:
            with contextlib.suppress(RunError):  # all else is saved
                self._write_config(finished=True)

    def close(self, failed):
        """End the W&B run and the lock; remove the directory of a new run that has failed before its first row."""
        if self.tracker:
            self.tracker("save", str(self.path / "model.pt"), str(self.path), "now")
            self.tracker("save", str(self.path / self.script.name), str(self.path), "now")
            self.tracker("finish", exit_code=int(failed))
        elif failed and mpi.rank() == 0 and not self.rows and not self.saves and self.args.resume is None:
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()
        if self.lock is not None:
            os.close(self.lock)
