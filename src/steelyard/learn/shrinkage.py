"""Proximal steps: what a penalty that has a kink at zero does to weights after a step, elementwise and by groups.

min_x  sum_i (x_i - z_i)^2 / (2 s_i) + penalty(x), for weights z and step sizes s. Pure arithmetic on tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_STEPS = 60  # at most; five to eight are enough but for groups on the brink of zero


def soft_threshold(
    z: Tensor,
    threshold: Tensor | float,  # broadcasts to z; inf gives zero
) -> Tensor:
    """sign(z) max(|z| - threshold, 0): the proximal step of threshold * |x|; zeros are exact.

    >>> soft_threshold(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
    tensor([-1.,  0.,  2.])
    """
    if not isinstance(threshold, Tensor):
        threshold = torch.as_tensor(threshold, dtype=z.dtype, device=z.device)
    return torch.where(z.abs() <= threshold, torch.zeros_like(z), z - z.sign() * threshold)


def shrink_groups(
    z: Tensor,  # (groups, members)
    sizes: Tensor | float,  # one number, or (groups, members) step sizes
    strengths: Tensor,  # (groups,): what multiplies the norm of each group
) -> Tensor:
    """The proximal step of sum_g strengths_g ||x_g||_2: a group becomes shorter, or zero as a whole.

    With one step size it is z_g max(1 - s t_g / ||z_g||, 0). With one for each member, x_i = z_i r / (r + s_i t_g)
    where r = ||x_g|| solves sum_i (z_i / (r + s_i t_g))^2 = 1; a group is zero if ||z_g / s_g|| <= t_g.
    The root is found in float64 by Newton's steps on the reciprocal of the norm, which is nearly linear in r
    (as for a trust region: Conn, Gould & Toint 2000, 7.3).

    >>> shrink_groups(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0, torch.tensor([1.0, 1.0]))
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    """
    if not isinstance(sizes, Tensor):
        norm = z.norm(dim=1, keepdim=True)
        pull = sizes * strengths[:, None]
        return torch.where(norm <= pull, torch.zeros_like(z), z * (1 - pull / norm))
    wide = z.double()
    pull = sizes.double() * strengths.double()[:, None]
    pulled = pull > 0  # where the pull is nothing the member stays, and keeps its group from zero
    kept = (wide / torch.where(pulled, pull, torch.ones_like(pull))).where(pulled, wide.sign() * torch.inf)
    alive = kept.nan_to_num(0.0, torch.inf, -torch.inf).square().sum(1) > 1
    norm = wide.norm(dim=1)
    r = (norm - pull.amax(1)).clamp_min(0.0)  # not above the root, from where Newton's steps go up to it
    for _ in range(NEWTON_STEPS):
        sums = r[:, None] + pull
        ratio = torch.where(sums > 0, wide / sums, torch.zeros_like(wide))
        square = ratio.square().sum(1)
        slope = torch.where(sums > 0, ratio.square() / sums, torch.zeros_like(wide)).sum(1)
        step = torch.where(alive & (slope > 0), (square.sqrt() - 1) * square / slope, torch.zeros_like(r))
        r = (r + step).clamp_min(0.0)
        if bool((step.abs() <= 1e-14 * norm).all()):
            break
    found = wide / (1 + pull / r.where(alive, torch.ones_like(r))[:, None])
    return torch.where(alive[:, None], found, torch.zeros_like(found)).to(z.dtype)
