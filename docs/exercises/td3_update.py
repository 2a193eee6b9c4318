"""Exercise 3. The update of TD3: the smoothed target, twin critics, the delayed policy.

Write update. Running this file checks it against that of td3.py; --train gives it to TD3, with small networks and episodes of
150 steps. Goals after 10 epochs of 4,000 steps: 300 on HalfCheetah-v4, and 150, which is the most there is, on
InvertedPendulum-v4.

    python docs/exercises/td3_update.py
    python docs/exercises/td3_update.py --train HalfCheetah-v4
"""

import sys
from pathlib import Path
from unittest.mock import patch

import check
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import td3  # noqa: E402
from td3 import gradient_step, polyak_average  # noqa: E402, F401

GOALS = {"HalfCheetah-v4": 300, "InvertedPendulum-v4": 150}


def update(ac, ac_targ, pi_optimizer, q_optimizer, batch, args, policy_turn):
    """One step of the critics and, if it is the policy's turn, of the actor and the targets. Returns a dict of what to log.

    The networks are ac.pi(obs) -> (B, act_dim) and ac.q[0](obs, act), ac.q[1](obs, act) -> (B,); those of ac_targ are the
    targets. args has gamma, target_noise, noise_clip and polyak. gradient_step(optimizer, loss) takes a step, and
    polyak_average(ac, ac_targ, polyak) lets the targets follow. Draw the noise by torch.randn_like(act), once.
    What to log: dict(LossQ=loss_q.item()) and, at the policy's turn, LossPi likewise."""
    raise NotImplementedError("write update")


def moved_by(update):
    """A function that says how far such an update moves each network."""

    def move(batch, policy_turn, target_noise, noise_clip=0.5):
        with patch.object(td3, "update", update):
            return check.one_update(td3, batch, policy_turn, target_noise=target_noise, noise_clip=noise_clip)

    return move


torch.manual_seed(0)
OBS, NEXT_OBS, ACT, REW = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 2) * 2 - 1, torch.randn(5)
ENDED, GOES_ON = (td3.Batch(OBS, ACT, REW, NEXT_OBS, terminated) for terminated in (torch.ones(5), torch.zeros(5)))
CASES = {
    "all transitions terminate, the critics' turn": dict(batch=ENDED, policy_turn=False, target_noise=0.0),
    "none terminates, no noise": dict(batch=GOES_ON, policy_turn=False, target_noise=0.0),
    "noise": dict(batch=GOES_ON, policy_turn=False, target_noise=0.1),
    "noise beyond its clip": dict(batch=GOES_ON, policy_turn=False, target_noise=5.0),
    "noise beyond the actions' bounds": dict(batch=GOES_ON, policy_turn=False, target_noise=5.0, noise_clip=3.0),
    "the policy's turn": dict(batch=GOES_ON, policy_turn=True, target_noise=0.1),
}


def train(options):
    args = td3.Args(
        env_id=options.train,
        total_steps=options.total_steps or 40_000,
        steps_per_epoch=min(4000, options.total_steps or 4000),
        max_ep_len=150,
        hidden_sizes=(128, 128),
        update_after=1000,
        exp_name=f"exercise_td3_update_{options.train}",
    )
    with patch.object(td3, "update", td3.update if options.use_soln else update):
        check.train(td3, args, GOALS.get(options.train))


if __name__ == "__main__":
    check.main(moved_by(update), moved_by(td3.update), CASES, train)
