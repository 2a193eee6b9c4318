"""What changes in the course of a run, to a checkpoint and back."""

import collections
import enum
import io
import pathlib
import pickle
import random
import types
from dataclasses import is_dataclass

import gymnasium as gym
import numpy as np
import torch

from utils.process import RunError, one_line

CONTAINERS = (list, tuple, dict, set, frozenset, bytearray, complex, int, float, str, torch.Size)
CONTAINERS += (collections.deque, collections.OrderedDict, collections.defaultdict, collections.Counter)
CODE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)  # what objects hold of it is left as it is
CONSTANT = (torch.device, torch.dtype, np.dtype, pathlib.PurePath, gym.Space)
GENERATORS = (  # the shared ones of random numbers: what gives the state, and what takes it
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    # asking starts CUDA on all devices
    (lambda: torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
     lambda states: torch.cuda.set_rng_state_all(states[: torch.cuda.device_count()])),
)


def state_functions(x):
    """The functions that give and take the state of a module, optimizer, environment or random generator; None for others."""
    if hasattr(x, "state_dict") and hasattr(x, "load_state_dict"):
        return x.state_dict, x.load_state_dict
    if isinstance(x, np.random.Generator):
        return lambda: x.bit_generator.state, lambda state: setattr(x.bit_generator, "state", state)
    if isinstance(x, random.Random):
        return x.getstate, x.setstate
    return (x.get_state, x.set_state) if isinstance(x, torch.Generator | np.random.RandomState) else None


class State:
    """Things by name: `write` writes them to a file, and `read` puts what is in the file back into them.

    What is there from the start is changed in place: modules, optimizers, environments and random generators by their own
    functions, objects attribute by attribute, arrays and tensors that have kept their shape. What has come since is built anew:
    plain values, containers, arrays, tensors, and the NamedTuples, enums and dataclasses of `module`, the script. The file is
    a pickle whose reader knows nothing but these, so it runs no code. Raises RunError at the start for what cannot be written.
    """

    def __init__(self, things, module, args=None):
        self.things, self.args, self.known, self.numbers, self.begun = things, args, [], {}, False
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and not hasattr(kind, "__post_init__")]
        self.kinds = {kind.__name__: kind for kind in kinds if issubclass(kind, tuple | enum.Enum) or is_dataclass(kind)}
        for name, thing in things.items():
            try:
                if isinstance(thing, tuple | frozenset | bytes | str | int | float | complex | np.generic | None):
                    raise TypeError(f"a {type(thing).__name__} cannot change; make it a tensor or an object's attribute")
                Writer(io.BytesIO(), self, buffer_callback=lambda array: None).dump(thing)  # arrays are not copied
            except Exception as error:
                raise RunError(f"{name}: --resume could not restore it: {one_line(error)}") from error
        self.begun, self.plan = True, [*things, *(type(x).__name__ for x in self.known)]

    def number(self, x):
        """The place of x among what is there from the start; None if it has come since."""
        if not self.begun and id(x) not in self.numbers:
            self.numbers[id(x)] = len(self.known)
            self.known.append(x)
        return self.numbers.get(id(x))

    def write(self, file, info):
        """Write `info`, plain data, and the things to a binary file."""
        Writer(file, self).dump((self.plan, info))
        Writer(file, self).dump([*self.things.values()])

    def read(self, file, total_steps=0):
        """Read what `write` has written; returns `info`. An array that is longer now keeps its length if the run has got more
        steps: if `total_steps` is above that of `info`."""
        plan, info = Reader(file, self).load()
        longer = total_steps > info.get("total_steps", total_steps)
        if plan != self.plan:
            raise ValueError("the script keeps other things in its state now")
        for thing, saved in zip(self.things.values(), Reader(file, self, longer).load(), strict=True):
            if isinstance(thing, list | bytearray | dict | set | collections.deque):
                thing.clear()
                (thing.update if isinstance(thing, dict | set) else thing.extend)(saved)
        return info


def take(*saved):
    """Stands in a file for Reader.take."""


def put(thing, attributes):
    """Stands in a file for Reader.put."""


class Writer(pickle.Pickler):
    def __init__(self, file, state, known=True, **options):
        super().__init__(file, protocol=5, **options)
        self.state, self.number = state, state.number if known else lambda x: None

    def reducer_override(self, x):
        """How to write what is not plain: `take` with its arguments, and for an object `put` with its attributes."""
        if isinstance(x, torch.Tensor):
            data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return take, ("tensor", self.number(x), str(x.dtype), x.shape, str(x.device), pickle.PickleBuffer(data))
        if isinstance(x, np.ndarray | np.generic) and not x.dtype.hasobject:
            data = np.require(x, requirements=["C", "W"]).reshape(-1).view(np.uint8)
            kind, number = ("array", self.number(x)) if isinstance(x, np.ndarray) else ("scalar", None)
            return take, (kind, number, np.lib.format.dtype_to_descr(x.dtype), x.shape, None, pickle.PickleBuffer(data))
        if x is take or x is put or type(x) in CONTAINERS or (isinstance(x, type) and x in CONTAINERS):
            return NotImplemented
        if isinstance(x, CODE):
            if self.state.kinds.get(x.__name__) is not x:
                raise TypeError(f"the {type(x).__name__} {x.__name__}, which is no value")
            return take, ("kind", x.__name__)
        if type(x) in self.state.kinds.values() and (isinstance(x, tuple | enum.Enum) or self.number(x) is None):
            return NotImplemented
        if self.number(x) is None or isinstance(x, CONTAINERS):
            raise TypeError(f"a {type(x).__name__} that was not there at the start, or of a kind that no file can hold")
        if state_functions(x):
            file = io.BytesIO()
            Writer(file, self.state, known=False).dump(state_functions(x)[0]())
            return take, ("state", self.number(x), file.getvalue())
        if isinstance(x, CONSTANT) or x is self.state.args:
            return take, ("constant", self.number(x))
        if not hasattr(x, "__dict__"):
            raise TypeError(f"a {type(x).__name__}; make it an array, a tensor or a list of numbers")
        attributes = {name: value for name, value in vars(x).items() if not isinstance(value, CODE)}
        return take, ("object", self.number(x)), attributes, None, None, put


class Reader(pickle.Unpickler):
    def __init__(self, file, state, longer=False):
        super().__init__(file)
        self.state, self.longer = state, longer

    def find_class(self, module, name):
        for x in (*CONTAINERS, take, put):
            if (x.__module__, x.__qualname__) == (module, name):
                return {take: self.take, put: self.put}.get(x, x)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def put(self, thing, attributes):
        vars(thing).update(attributes)

    def take(self, kind, number, *saved):
        """What stands for x: the one that is there from the start, with what was saved of it, or a new array or tensor."""
        if kind == "kind":
            return self.state.kinds[number]
        live = None if number is None else self.state.known[number]
        if kind == "state":
            state_functions(live)[1](Reader(io.BytesIO(*saved), self.state).load())
        if kind not in ("tensor", "array", "scalar"):
            return live
        dtype, shape, device, data = saved
        new = np.ndarray(len(memoryview(data)), np.uint8, data)
        if kind == "tensor":
            new = torch.from_numpy(new).view(getattr(torch, dtype.removeprefix("torch."))).reshape(shape).to(device)
        else:
            new = new.view(np.lib.format.descr_to_dtype(dtype)).reshape(shape)
        if number is None:
            return new[()] if kind == "scalar" else new
        part = live.detach() if kind == "tensor" else live
        part = part[: len(new)] if self.longer and new.ndim and part.ndim else part
        fits = part.shape == new.shape and part.dtype == new.dtype
        if fits:
            try:
                part[...] = new
            except (ValueError, RuntimeError):  # one number stands for many, or it is read-only
                fits = False
        return live if fits else new
