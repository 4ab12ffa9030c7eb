"""The scale of uniform levels that loses least, group by group: many candidates over values that stay in the cache."""

from __future__ import annotations

import numpy as np

from steelyard.kernels import kernel


@kernel
def search_scales(x, mass, shares, top, symmetric, power, kept_bits, zero_bits, fits, scales, zeros):
    """Fill `scales` and `zeros`, (groups,) float64, for the least sum of mass |x - level|^power in each group.

    x (groups, members) float32; mass (groups or 1, members or 1) float32, positive; shares (candidates,) of the span of
    each group; levels are zero + code scale with codes 0 to top, or code - top // 2 where `symmetric`. Scales keep
    `kept_bits` significant bits, zeros `zero_bits`. With power 2 the best is fitted to its codes up to `fits` times.
    """
    groups, members = x.shape
    middle = top // 2 if symmetric else 0
    for g in range(groups):
        m = g if mass.shape[0] > 1 else 0
        low, high = np.inf, -np.inf
        for i in range(members):
            v = x[g, i]
            low = min(low, v)
            high = max(high, v)
        most = max(abs(low), abs(high))
        best, best_scale, best_zero = np.inf, 0.0, 0.0
        tries = len(shares) + (fits if power == 2.0 else 0)
        scale, zero = 0.0, 0.0
        for t in range(tries):
            if t < len(shares):
                if symmetric:
                    scale = most * shares[t] / max(middle, 1)
                else:
                    centre = (low + high) / 2
                    zero = centre - (centre - low) * shares[t]
                    scale = (high - low) * shares[t] / top
            scale = _short(scale, kept_bits)
            zero = _short(zero, zero_bits)
            loss = 0.0
            total, sum_c, sum_x, sum_cc, sum_cx = 0.0, 0.0, 0.0, 0.0, 0.0
            inverse = 1.0 / scale if scale > 0 else 1.0
            for i in range(members):
                v = np.float64(x[g, i])
                code = np.rint((v - zero) * inverse) + middle
                code = min(max(code, 0.0), np.float64(top)) - middle
                away = abs(v - zero - code * scale)
                w = mass[m, i if mass.shape[1] > 1 else 0]
                loss += w * (away * away if power == 2.0 else away**power)
                total += w
                sum_c += w * code
                sum_x += w * v
                sum_cc += w * code * code
                sum_cx += w * code * v
            if loss < best:
                best, best_scale, best_zero = loss, scale, zero
                fit_scale, fit_zero = scale, zero
                if symmetric:
                    if sum_cc > 0 and sum_cx > 0:
                        fit_scale = sum_cx / sum_cc
                elif total > 0:
                    spread = sum_cc - sum_c * sum_c / total
                    shared = sum_cx - sum_c * sum_x / total
                    if spread > 0 and shared > 0:
                        fit_scale = shared / spread
                        fit_zero = (sum_x - fit_scale * sum_c) / total
                next_scale, next_zero = fit_scale, fit_zero
            elif t >= len(shares):
                break  # a fit that does not help ends the fitting
            if t >= len(shares) - 1:
                scale, zero = next_scale, next_zero
        scales[g], zeros[g] = best_scale, best_zero


@kernel
def _short(x, bits):
    """`x` rounded to so many significant bits."""
    if x == 0.0 or not np.isfinite(x):
        return x
    exponent = np.floor(np.log2(abs(x)))
    unit = 2.0 ** (bits - 1 - exponent)
    return np.rint(x * unit) / unit
