"""The arguments that every run has, and the types that arguments may have."""

import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from utils.process import RunError
from utils.run_dir import read_config


class Range(NamedTuple):
    """What a number has to be. It stands in an argument's type: beta: Annotated[float, Range(lambda x: x < 1, "below 1")]"""

    holds: Callable  # written so that NaN does not hold
    text: str


class Total(NamedTuple):
    """That a number is a total, which is split evenly over the `parts`: "ranks" or "environments"."""

    parts: str
    or_one_each: bool = False  # a smaller number than there are parts stands for one each


def _whole(words):
    if set("eE.") & set(words[0]) and float(words[0]).is_integer():  # 1e6
        return int(float(words[0]))
    return int(words[0])


_INT = PrimitiveConstructorSpec(1, "INT", _whole, lambda x: isinstance(x, int), lambda x: [str(x)])
AtLeast0 = Annotated[int, _INT, Range(lambda x: x >= 0, "at least 0")]
AtLeast1 = Annotated[int, _INT, Range(lambda x: x >= 1, "at least 1")]
TotalOfRanks = Annotated[AtLeast1, Total("ranks")]
TotalOfEnvs = Annotated[AtLeast1, Total("environments")]
EnvsOfRanks = Annotated[AtLeast1, Total("ranks", or_one_each=True)]
NonNegative = Annotated[float, Range(lambda x: 0 <= x < math.inf, "at least 0 and finite")]
Positive = Annotated[float, Range(lambda x: 0 < x < math.inf, "above 0 and finite")]
Fraction = Annotated[float, Range(lambda x: 0 <= x <= 1, "between 0 and 1")]
LogStd = Annotated[float, Range(lambda x: -20 <= x <= 2, "between -20 and 2")]


@dataclass
class RunArgs:
    """The arguments that every run has and no paper mentions."""

    exp_name: str | None = None  # name of the experiment; <algorithm>_<env_id> if not given
    data_dir: str = "data"  # the run goes to <data_dir>/<exp_name>/<exp_name>_s<seed>/
    save_freq: AtLeast1 = 10  # epochs between two saves of model.pt and of the checkpoint; the last epoch always saves
    keep_checkpoints: bool = False  # keep each saved model, as model_<epoch>.pt
    resume: str | None = None  # run directory of an interrupted run to go on with; only --total-steps may change
    device: str = "cpu"  # torch device of the networks: cpu, cuda, cuda:1, mps
    torch_threads: AtLeast1 = 1  # torch threads per process, at most its cores; a second one helps sac.py (docs/results.md)
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "deep-rl"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group, to hold runs together

    def __post_init__(self):
        """With `resume`, take over the arguments of that run: all that are not given, on the command line or, from Python, by
        another value than the default. Raises RunError for one that is given and differs."""
        if self.resume is None:
            return
        config, main = read_config(self.resume), sys.modules["__main__"]
        words = sys.argv[1:] if getattr(main, "Args", None) is type(self) else []
        flags = {re.sub("^__(no_)?|=.*", "", word.replace("-", "_")) for word in words if word.startswith("--")}
        defaults = type(self)()
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), getattr(defaults, field.name)
            old = config.get(field.name, default)  # a script may have got new arguments since
            old = tuple(old) if isinstance(old, list) and "list" not in str(field.type) else old  # JSON has neither tuples
            old = pathlib.Path(old) if isinstance(old, str) and "Path" in str(field.type) else old  # nor paths
            if value == default and field.name not in flags:
                setattr(self, field.name, old)
            elif value != old and field.name not in ("resume", "total_steps"):
                flag = "--" + field.name.replace("_", "-")
                raise RunError(f"{flag} {value}: the run to resume has {old}; leave it out, or start a new run")


def cli(Args, words=None):
    """`Args`, a dataclass on RunArgs, from the words of a command line, by default the program's. Exits as tyro does."""
    fields, common = Args.__dataclass_fields__, RunArgs.__dataclass_fields__
    Args.__dataclass_fields__ = dict(sorted(fields.items(), key=lambda item: item[0] in common))  # the order of the help
    words = [word for w in (sys.argv[1:] if words is None else words) for word in spelled_out(w)]
    return tyro.cli(Args, args=words, description=sys.modules[Args.__module__].__doc__)


def spelled_out(word):
    """The words for what a sweep or a W&B agent writes: --norm_obs=False is --no-norm_obs, --hidden_sizes=[8, 8] has two values."""
    flag, _, value = word.partition("=")
    if flag.startswith("--") and value.lower() in ("true", "false"):
        return [flag if value.lower() == "true" else f"--no-{flag[2:]}"]
    return [flag, *re.findall(r"[^\s,\[\]()]+", value)] if value[:1] in ("[", "(") else [word]
