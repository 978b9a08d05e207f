"""Asynchronous SGD, float64, straight from the formulas: the whole trajectory is kept."""

import numpy as np


def trajectory(gradient, start, delays, *, lr, momentum=0.0, rule="asgd", lam=0.0, decay=0.95,
               eps=1e-7, senders=None):
    """Every iterate w_0 ... w_steps, (steps + 1, n), float64.

    ``gradient(w, k)``; ``delays`` tau_k (steps,); ``senders`` the worker of each update.
    """
    ws = [np.asarray(start, dtype=np.float64).copy()]
    mean_square = {}
    for k, tau in enumerate(delays):
        w_old = ws[k - tau]
        g = np.asarray(gradient(w_old, k), dtype=np.float64)
        strength = lam
        if rule == "dc-asgd-a":
            worker = 0 if senders is None else senders[k]
            before = mean_square.get(worker, np.zeros_like(g))
            mean_square[worker] = decay * before + (1 - decay) * g**2
            strength = lam / np.sqrt(mean_square[worker] + eps)
        elif rule == "asgd":
            strength = 0.0
        compensated = g + strength * g * g * (ws[k] - w_old)
        previous = ws[k - 1] if k > 0 else ws[0]
        ws.append(ws[k] - lr * compensated + momentum * (ws[k] - previous))
    return np.stack(ws)
