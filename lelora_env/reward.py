"""The reward of an env step, as plain functions of the losses.

Shapes: L lanes.
"""

import numpy as np


def reward_parts(
    loss: np.ndarray, loss_before: np.ndarray, trained_fraction: np.ndarray, alpha: float, rank_cost: float
) -> dict[str, np.ndarray]:
    """The named parts that a reward is the sum of, each (L,).

    reward = -(L1 + α·L2), with L1 the loss on the reward rows after the step (Eq. 2) and
    L2 = L1 - loss before it (Eq. 3), minus λ times the trained fraction where a price is set.

    Args:
        loss: (L,) L1, nats or squared error.
        loss_before: (L,) the L1 of the step before.
        trained_fraction: (L,) share of the adaptable numbers that this action trains, in [0, 1].
        alpha: α.
        rank_cost: λ.
    """
    return {
        "reward_l1": -loss,
        "reward_l2": -alpha * (loss - loss_before),
        "reward_rank_cost": -rank_cost * trained_fraction,
        "reward_divergence": np.zeros_like(loss),
    }


def divergence_penalty(worst: np.ndarray, steps_left: np.ndarray) -> np.ndarray:
    """What a diverged lane gets instead of a reward, (L,): worse than any way of finishing.

    The undiscounted return then lies 1 below that of finishing the run at the worst finite reward
    seen in this episode.

    Args:
        worst: (L,) worst finite reward of the episode so far.
        steps_left: (L,) env steps that were left, the diverging one included.
    """
    penalty: np.ndarray = worst * steps_left - 1.0
    return penalty
