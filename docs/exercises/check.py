"""Compares an answer with the solution and says what is wrong with it; trains with it. All the exercises use it."""

import sys
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from torch.nn.utils import parameters_to_vector


@dataclass
class Options:
    use_soln: bool = False  # take our solution in place of your answer
    train: str | None = None  # an environment to train in, where the exercise has one; nothing is checked then
    total_steps: int | None = None  # with --train: environment steps; the exercise's own number if not given


def main(answer, solution, cases, train=None):
    """Run an exercise as the command line says: check the answer, or give it to `train(options)`."""
    options = tyro.cli(Options)
    if options.train is None:
        check(solution if options.use_soln else answer, solution, cases)
    elif train is None:
        sys.exit("this exercise has nothing to train")
    else:
        train(options)


def check(answer, solution, cases):
    """Call both with the inputs of each case: a tensor or a dict of tensors comes out. Ends the program if they differ."""
    for case, inputs in cases.items():
        tensors = {k: x for k, x in inputs.items() if isinstance(x, torch.Tensor)}
        given = inputs | {k: x.clone() for k, x in tensors.items()}
        try:
            got, expected = answer(**given), solution(**inputs)
        except NotImplementedError as todo:
            sys.exit(f"to do: {todo}")
        if not isinstance(expected, dict):
            got, expected = {"the result": got}, {"the result": expected}
        faults = [f"{part} {fault}" for part in expected if (fault := difference(got[part], expected[part]))]
        faults += [f"its input {k} was changed" for k, x in tensors.items() if not torch.equal(given[k], x)]
        if faults:
            shown = [f"    {k} = {x.tolist()}" for k, x in tensors.items() if x.numel() <= 12]
            sys.exit("\n".join([f"Wrong in the case: {case}.", *faults, *shown]))
        print(f"right: {case}")


def difference(got, expected):
    """What distinguishes a tensor from the expected one, in words; None if nothing does."""
    if not isinstance(got, torch.Tensor):
        return "is None: is there a return?" if got is None else f"is of type {type(got).__name__}, not a tensor"
    shape, right_shape = tuple(got.shape), tuple(expected.shape)
    if shape != right_shape:
        return f"has the shape {shape}, not {right_shape}{hint(shape, right_shape)}"
    got, expected = got.detach().to(expected.dtype), expected.detach()
    wrong = ~torch.isclose(got, expected, rtol=1e-4, atol=1e-5)
    if not wrong.any():
        return None
    if torch.allclose(-got, expected, rtol=1e-4, atol=1e-5):
        return "has the wrong sign"
    at = tuple(wrong.nonzero()[0].tolist())
    return f"is {got[at]:.4g}, not {expected[at]:.4g}, at {list(at)}; {wrong.sum()} of {wrong.numel()} values are wrong"


def hint(shape, right_shape):
    if shape == right_shape + (1,):
        return ": squeeze(-1) takes the last dimension away"
    if right_shape and shape == 2 * right_shape:
        return ": (B,) and (B, 1) were broadcast to (B, B)"
    if len(shape) == len(right_shape):
        return ": is it summed over the wrong dimension?"
    return ": something is not summed" if len(shape) > len(right_shape) else ": too much is summed or averaged"


def one_update(script, batch, *turn, **changes):
    """How far an update moves each part of fresh networks, by plain gradient descent with learning rate 1."""
    torch.manual_seed(0)
    obs_space, act_space = (gym.spaces.Box(-1, 1, (x.shape[-1],)) for x in (batch.obs, batch.act))
    args = script.Args(hidden_sizes=(8,), **changes)
    ac, ac_targ = (script.ActorCritic(obs_space, act_space, args) for _ in range(2))
    ac_targ.requires_grad_(False)
    parts = {"actor": ac.pi, "critic": ac.q, "target actor": ac_targ.pi, "target critic": ac_targ.q}
    before = {part: parameters_to_vector(module.parameters()).detach() for part, module in parts.items()}
    script.update(ac, ac_targ, *(torch.optim.SGD(module.parameters(), 1.0) for module in (ac.pi, ac.q)), batch, args, *turn)
    after = {part: parameters_to_vector(module.parameters()).detach() for part, module in parts.items()}
    return {f"the step of the {part}": after[part] - before[part] for part in parts}


def train(script, args, goal):
    """Train, then say what ten deterministic episodes return on average and whether that reaches the goal."""
    args.exp_name = args.exp_name.replace(":", "-")  # of an environment in a module
    ac, env = script.train(args), gym.make(args.env_id, max_episode_steps=args.max_ep_len)
    total = 0.0
    for seed in range(10):
        (obs, _), ended = env.reset(seed=seed), False
        while not ended:
            obs, rew, terminated, truncated, _ = env.step(ac.act(obs[None], deterministic=True)[0])
            total, ended = total + rew, terminated or truncated
    reached = "" if goal is None else f"; the goal, {goal}, is {'reached' if total / 10 >= goal else 'not reached'}"
    print(f"{args.env_id}: {total / 10:.1f}{reached}")
