"""Lambda by feedback: it moves by how far the measured share of zeros is from a path to the target (METHOD.md)."""
import math

import torch
from torch import Tensor

ENDS = 0.75  # the path is at the target when this share of the stage's summed learning rate is spent, and stays there
STEPS, PART = 8, 1 / 200  # a control step after so many training steps, or this share of the summed learning rate
GAIN, AHEAD, SMOOTHING = 15.0, 10, 0.3  # log lambda per share; control steps looked ahead; weight of the newest speed
RISE, FALL = 0.3, 0.2  # the most that log lambda rises and falls in a control step
BAND, FADE = 0.002, 0.2  # surplus that is let be; how fast a low is forgotten, a control step
RANGE = 1e6  # lambda stays within this factor of the one it began with
FIRST = 0.05  # the first lambda is for the zeros that the path wants when this share of the rate is spent


class Feedback:
    """Lead the share of zeros along a path by moving lambda.

    path:  the wanted share now, a float. lam: lambda, a 0-dim float64 tensor on the weights' device; nothing here waits
           for that device. off, speed, low: 0-dim tensors too: the measured share minus the path's, its smoothed change
           a control step, and its latest lows.
    """

    def __init__(self, target: float):
        self.target, self.path, self.lam = target, 0.0, torch.zeros((), dtype=torch.float64)
        self.start = self.first = None  # share of zeros and lambda that the path begins with
        self.spent = self.total = 0.0  # learning rate: so far, and of the whole stage
        self.steps, self.rate = 0, 0.0  # since the last control step: training steps, learning rate
        self.every = STEPS  # fewer in a short stage, also where its rate is low

    @property
    def begun(self) -> bool:
        return self.start is not None

    def begin(self, share: float, lr_to_come: float) -> float:
        """Lay the path from a share of zeros; return the share that it wants a twentieth of the stage later."""
        self.start, self.total = min(share, self.target), self.spent + lr_to_come
        self.path = self.start
        return self.at(FIRST)

    def set(self, lam: float, device) -> None:
        """Take this lambda to begin with."""
        self.first = lam
        self.lam = torch.tensor(lam, dtype=torch.float64, device=device)
        self.off, self.speed, self.low = (torch.zeros_like(self.lam) for _ in range(3))

    def at(self, part: float) -> float:
        """The path: S - (S - s0) (1 - min(u / ENDS, 1))^3, with u the spent share of the learning rate."""
        return self.target - (self.target - self.start) * (1 - min(part / ENDS, 1)) ** 3

    def due(self, lr: float) -> bool:
        """Count a training step with this learning rate; return whether a control step is due after it."""
        self.spent, self.steps, self.rate = self.spent + lr, self.steps + 1, self.rate + lr
        if self.total:  # where the stage was made longer, the path waits and does not go back
            self.path = max(self.path, self.at(self.spent / self.total))
        due = self.steps >= self.every or self.rate >= PART * self.total
        self.every = min(self.every, self.steps) if due else self.every
        return due

    def control(self, share: Tensor) -> None:
        """Move lambda, given the measured share of zeros (0-dim, float64)."""
        self.steps, self.rate = 0, 0.0
        off = share - self.path
        self.speed = torch.lerp(self.speed, off - self.off, SMOOTHING)
        self.low = torch.minimum(off, torch.lerp(self.low, off, FADE))
        self.off = off
        ahead = off + AHEAD * self.speed
        surplus = torch.minimum(ahead, self.low - BAND).clamp(min=0)
        move = GAIN * ((-ahead).clamp(min=0) - surplus)
        lam = self.lam * move.clamp(-FALL, RISE).exp()
        self.lam = lam.clamp(self.first / RANGE, self.first * RANGE)

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def first_lambda(q: float, eps: float, lr_to_come: float) -> float:
    """The lambda that drives unopposed weights up to the size q to zero within the first FIRST of the stage."""
    q = max(q, eps)  # there is something to multiply where the zeros are there already
    return q * (q + eps) / (FIRST * lr_to_come)


def quantile(values: Tensor, share: float) -> float:
    """The value that this share of `values` does not exceed."""
    return values.kthvalue(max(1, math.ceil(share * values.numel()))).values.item()
