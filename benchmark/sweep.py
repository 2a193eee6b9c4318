"""Run a script once for each combination of settings, several runs at a time, in processes of one thread each.

    python -m benchmark.sweep ppo.py --env-id Hopper-v4 Walker2d-v4 --seed 0 1 2 --clip-ratio 0.1 0.2 --workers 2

Flags that are not listed below go to the scripts that have them, and each may have several values. True and False are values
of a switch (--norm-obs True False); one without a value is handed on (--track). A flag that takes several words, as
--hidden-sizes 64 64 does, has one value, unless words are quoted together: --hidden-sizes "64 64" "256 256 256" "32" has three.

Runs are called <script>_<env_id>, with what differs between them but the seed: three letters of the flag and the value, as in
ppo_Hopper-v4_cli0-1. --clip-ratio[eps] 0.1 0.2 makes it ppo_Hopper-v4_eps0-1; quote the brackets where the shell needs it.
All combinations are checked before the first run starts. The output of a run goes to a .log file next to its directory.
With --track the runs share a W&B group, the sweep's --exp-name or else the scripts' names.

From Python: sweep("ppo.py", {"env_id": ["Hopper-v4"], "seed": [0, 1], "hidden_sizes": [(64, 64), (256, 256)]}, workers=2)
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tyro
from tyro.conf import Positional

from benchmark.pool import Run, execute, interruptible, read_rows, steps_done
from utils import mpi
from utils.args import AtLeast1, cli, spelled_out
from utils.check import check, check_ranges
from utils.evaluate import ROOT, import_script
from utils.process import RunError, available_cores, say
from utils.run_dir import as_json, read_config, same_code


@dataclass
class Args:
    scripts: Positional[tuple[str, ...]]  # algorithm files
    workers: AtLeast1 | None = None  # runs at a time; default: as many as there are cores for
    skip_done: bool = False  # leave out finished runs and resume those with a checkpoint, if they are of the same code
    print: bool = False  # print the commands, one per line, and run nothing
    mpi: AtLeast1 = 1  # processes of each run, which mpirun starts
    exp_name: str | None = None  # what the names begin with instead of <script>_<env_id>
    data_dir: str = "data"  # runs go to <data_dir>/<name>/<name>_s<seed>/


@functools.cache
def arguments(script):
    """The Args of a script, and its arguments' types as text by flag; of a switch, by no-<flag> too."""
    if not script.endswith(".py") or not Path(script).is_file():
        raise RunError(f"{script}: no such script")
    sys.path.insert(0, str(Path(script).resolve().parent))  # as Python does when it runs a script
    module = import_script(script)
    if not hasattr(module, "Args"):
        raise RunError(f"{script}: has no Args, as the algorithm files have")
    types = {f.name.replace("_", "-"): str(f.type) for f in fields(module.Args)}
    return module.Args, types | {f"no-{flag}": kind for flag, kind in types.items()}


def is_tuple(key, scripts):
    """Whether the argument takes several words, in one of the scripts at least."""
    return any("tuple" in arguments(script)[1].get(flag_of(key), "") for script in scripts)


def flag_of(key):
    """Keys of a grid may end in a shorthand: "clip_ratio[eps]" is --clip-ratio."""
    return key.partition("[")[0].replace("_", "-")


def parse(argv):
    """Split a command line into this module's Args and the grid: a dict from flag to its values, as text."""
    args, rest = tyro.cli(Args, args=argv, prog="python -m benchmark.sweep", description=__doc__, return_unknown_args=True)
    scripts, grid = list(args.scripts), {}
    values = scripts  # what takes the words that are no flags
    for word in rest:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            grid[key] = values = grid.get(key, []) + [value] * bool(equals)
        else:
            values.append(word)
    args.scripts = tuple(scripts)
    for key, values in grid.items():
        if is_tuple(key, args.scripts):
            values = values if any(re.search(r"[ ,][-.\w]|^[\[(].*[\])]$", value) for value in values) else [" ".join(values)]
            grid[key] = [f"[{value}]" for value in values]
    return args, {key: values or ["True"] for key, values in grid.items()}


def shorthands(keys):
    """What stands for each key in names: its shorthand, or the first letters of its flag, all where two begin alike."""
    flags = {key: flag_of(key).replace("-", "") for key in keys}
    alike = Counter(flag[:3] for flag in flags.values())
    flags = {key: flag[:3] if alike[flag[:3]] == 1 else flag for key, flag in flags.items()}
    return {key: key.partition("[")[2].rstrip("]") or flag for key, flag in flags.items()}


def safe(text):
    """The text with dashes for what a name cannot hold."""
    return re.sub(r"[^A-Za-z0-9_.+=,-]", "-", text)


def plan(args, grid):
    """The Runs of a grid, checked, without starting or writing anything.

    grid: a dict from flag, with a shorthand or without, to its values, as text; "True" for a switch, "[64 64]" for a tuple.
    Raises RunError for what a run would refuse; SystemExit for what its command line would, after the script's message.
    """
    if mpi.size() > 1:
        raise RunError(f"write --mpi {mpi.size()} instead of mpirun -n {mpi.size()}: the sweep is one process")
    if not args.scripts:
        raise RunError("name a script: python -m benchmark.sweep ppo.py --seed 0 1 2")
    check_ranges(args)
    flags = [flag_of(key) for key in grid]
    for flag in flags:
        if flag in ("exp-name", "data-dir", "resume") or flags.count(flag) > 1:
            raise RunError(f"--{flag}: is given twice, or is no argument that a sweep can vary; see sweep's own options")
    short = shorthands(key for key in grid if len(grid[key]) > 1 and flag_of(key) not in ("seed", "env-id"))
    stems = {script: safe(Path(script).stem).lstrip("_.+=,-") or "script" for script in args.scripts}
    several_envs = any(len(grid[key]) > 1 for key in grid if flag_of(key) == "env-id")
    rest = ["--data-dir", os.path.expanduser(args.data_dir)] + ["--torch-threads", "1"] * ("torch-threads" not in flags)
    rest += ["--wandb-group", args.exp_name or "_".join(stems.values())] * ("track" in flags and "wandb-group" not in flags)
    known = {flag for script in args.scripts for flag in arguments(script)[1]}
    runs = []
    for script in args.scripts:
        Args, types = arguments(script)
        keys = [key for key in grid if flag_of(key) in types or flag_of(key) not in known]  # what is unknown it refuses itself
        for values in itertools.product(*map(grid.get, keys)):
            argv = [w for key, value in zip(keys, values, strict=True) for w in spelled_out(f"--{flag_of(key)}={value}")]
            run_args = cli(Args, argv + rest)
            run_args.exp_name = args.exp_name
            try:
                check(run_args, args.mpi)  # completes env_id
            except RunError as error:
                raise RunError(f"{script}: {error}") from None
            parts = [args.exp_name] if args.exp_name else [stems[script], safe(run_args.env_id)]
            parts += [stems[script]] * bool(args.exp_name and len(args.scripts) > 1)
            parts += [safe(run_args.env_id)] * bool(args.exp_name and several_envs)
            parts += [safe(short[k] + v.strip("[]")).replace(".", "-") for k, v in zip(keys, values, strict=True) if k in short]
            run = Run("_".join(parts), run_args.seed, args=run_args)
            if str(run) in map(str, runs):
                raise RunError(f"two runs would be called {run}: leave one out, or sweep it on its own with another --exp-name")
            run_args.exp_name = run.name
            launcher = ["mpirun", "-n", str(args.mpi)] * (args.mpi > 1) + [sys.executable, script]
            if Path(script).resolve().parent != ROOT:  # where it does not find utils/ by itself
                path = ":".join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
                launcher = ["env", f"PYTHONPATH={path}", *launcher]
            run.command = [*launcher, *argv, "--exp-name", run.name, *rest]
            if args.skip_done:
                use_earlier_attempts(run, script, launcher, args.mpi)
            runs.append(run)
    return runs


def use_earlier_attempts(run, script, launcher, ranks):
    """Mark the run as finished if one with the same arguments and code is, or let it resume the one that got furthest."""
    wanted = json.loads(as_json(asdict(run.args))) | {"script": Path(script).name, "ranks": ranks}
    for name in ("exp_name", "data_dir", "resume", "torch_threads"):  # which may differ between two attempts at the same run
        del wanted[name]
    steps = {}
    for path in sorted(run.parent.glob(f"{run}*/config.json")):
        with contextlib.suppress(RunError):  # not of a run
            config = read_config(path.parent)
            if {name: value for name, value in wanted.items() if name in config}.items() <= config.items():
                if wanted.keys() <= config.keys() and same_code(path.parent, script):  # older ones lack new arguments
                    steps[path.parent] = steps_done(read_rows(path.parent / "progress.txt"))
                else:
                    run.outdated = path.parent
    resumable = [p for p in steps if all(any((p / "checkpoint").glob(f"*_rank{rank}.ckpt")) for rank in range(ranks))]
    # a run that was killed after its last row and before its last save has a checkpoint to go on with
    done = [path for path in steps if steps[path] >= run.args.total_steps]
    finished = [path for path in done if path not in resumable or read_config(path).get("finished", True)]
    if finished:
        run.run_dir, run.returncode = max(finished, key=steps.get), 0
    elif resumable:
        run.resumes = max(resumable, key=steps.get)
        run.fraction_before = steps[run.resumes] / run.args.total_steps
        run.command = [*launcher, "--resume", str(run.resumes)]
    elif run.outdated:
        say(f"{run.outdated}: was made by other code than {script} has now; {run} starts anew", sys.stderr)


def sweep(script, grid, **options):
    """Run `script` (a path, or several) once for each combination of the values of `grid`.

    grid: a dict from an argument's name to its values, a list or any iterable but a string; for an argument that is a tuple
    itself, a tuple is one value unless it holds tuples. options: the other fields of Args, such as workers=2. Returns the Runs,
    each with name, seed, run_dir (None if there is none) and returncode. Raises RunError before any starts if one would refuse
    its arguments.
    """
    arguments.cache_clear()  # a script may have changed since
    args = Args(tuple(map(str, [script] if isinstance(script, str | Path) else script)), **options)
    texts = {}
    for key, values in grid.items():
        one = isinstance(values, tuple) and is_tuple(key, args.scripts) and not any(isinstance(x, list | tuple) for x in values)
        if one or isinstance(values, str) or not hasattr(values, "__iter__"):
            values = [values]
        texts[key] = [f"[{' '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value) for value in values]
    runs = plan(args, texts)
    if args.print:
        print("\n".join(shlex.join(run.command) for run in runs if run.returncode is None))
    else:
        threads = args.mpi * max((run.args.torch_threads for run in runs), default=1)
        execute(runs, args.workers or max(1, available_cores() // threads))
    return runs


def main(argv):
    """Returns the exit status: 1 if a run failed."""
    args, grid = parse(argv)
    options = vars(args)
    return int(any(run.returncode for run in sweep(options.pop("scripts"), grid, **options)))


if __name__ == "__main__":
    again = sys.argv[1:] if "--skip-done" in sys.argv else [*sys.argv[1:], "--skip-done"]
    with interruptible("python", "-m", "benchmark.sweep", *again):
        sys.exit(main(sys.argv[1:]))
