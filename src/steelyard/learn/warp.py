"""Images turned, stretched and shifted, resampled bilinearly. Knows nothing of why."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def warped(
    images: Tensor,  # (n, channels, height, width)
    *,
    angle: Tensor | float = 0.0,  # radians, (n,) as the following
    across: Tensor | float = 1.0,
    along: Tensor | float = 1.0,  # the height
    right: Tensor | float = 0.0,  # pixels
    down: Tensor | float = 0.0,
    fill: float = 0.0,
) -> Tensor:
    """Each image read at places that are turned, stretched and shifted; `fill` is what lies outside of it.

    >>> image = torch.zeros(1, 1, 4, 4)
    >>> image[0, 0, 1, 1] = 1
    >>> warped(image, right=1.0)[0, 0, 1].round().tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    count, _, height, width = images.shape
    angle, across, along, right, down = (
        torch.as_tensor(x, dtype=images.dtype).expand(count) for x in (angle, across, along, right, down)
    )
    x, y = right * 2 / width, down * 2 / height  # in units of half an image
    cosine, sine = angle.cos(), angle.sin()
    first = torch.stack([across * cosine, -along * sine, x], 1)
    second = torch.stack([across * sine, along * cosine, y], 1)
    grid = functional.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images - fill, grid, mode="bilinear", align_corners=False) + fill
