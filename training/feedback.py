"""Adjust lambda by feedback, so that the measured share of zeros follows a path to the target (see METHOD.md)."""
import torch
from torch import Tensor

# u ("spent"): the sum of the learning rates of the steps made, divided by that of the whole stage.
ENDS = 0.75  # u at which the path reaches the target
STEPS, PART = 8, 1 / 200  # a control step follows after 8 training steps, or when u has grown by 1/200
GAIN = 15.0  # change of log lambda for an error of 1 in the share of zeros
AHEAD = 10  # how many control steps ahead the error is predicted
SMOOTHING = 0.3  # weight of the newest value in the average of the error's change
RISE = 0.3  # largest rise of log lambda in a control step
# {True for single weights, False for groups: largest fall of log lambda in a control step, (before, after) the path is
# at the target}
FALL = {True: (0.2, 0.05), False: (1.0, 0.2)}
BAND = {True: 0.002, False: 0.01}  # surplus of zeros that is tolerated
FADE = 0.2  # rate, per control step, at which the error's recent minimum follows the error upwards
RANGE = 1e6  # lambda stays within this factor of its first value
FIRST = 0.05  # the first lambda is chosen for the share of zeros that the path wants at this u


class Feedback:
    """Adjust lambda so that the share of zeros follows a path.

    single: True if single weights become zero, False for groups. Whenever lambda falls, some single weights become
            non-zero, and at small learning rates they do not return to zero; so at the target lambda may only fall
            slowly. Groups stay zero until lambda is very low.
    path:   the share of zeros wanted now, a float.
    lam:    lambda, a 0-dim float64 tensor on the weights' device. No method waits for that device.
    off, speed, low: 0-dim tensors: the measured share minus `path`, its smoothed change per control step, and its
            recent minimum.
    """

    def __init__(self, target: float, single: bool = True):
        self.single = single
        self.target, self.path, self.lam = target, 0.0, torch.zeros((), dtype=torch.float64)
        self.start = self.first = None  # share of zeros at the start of the path, and the first lambda
        self.spent = self.total = 0.0  # sums of learning rates: of the steps made, and of the whole stage
        self.steps, self.rate = 0, 0.0  # since the last control step: training steps, and the sum of their rates
        self.every = STEPS  # fewer in a short stage, also where its rate is low

    @property
    def begun(self) -> bool:
        return self.start is not None

    def begin(self, share: float, lr_to_come: float) -> float:
        """Start the path at the present share of zeros; return the share that it wants when FIRST is spent."""
        self.start, self.total = min(share, self.target), self.spent + lr_to_come
        self.path = self.start
        return self.at(FIRST)

    def set(self, lam: float, device) -> None:
        """Set the first lambda."""
        self.first = lam
        self.lam = torch.tensor(lam, dtype=torch.float64, device=device)
        self.off, self.speed, self.low = (torch.zeros_like(self.lam) for _ in range(3))

    def at(self, part: float) -> float:
        """Return the path S - (S - s0) (1 - min(u / ENDS, 1))^3, where u = `part` is the share that is spent."""
        return self.target - (self.target - self.start) * (1 - min(part / ENDS, 1)) ** 3

    def due(self, lr: float) -> bool:
        """Count a training step with this learning rate; return True if a control step is due after it."""
        self.spent, self.steps, self.rate = self.spent + lr, self.steps + 1, self.rate + lr
        if self.total:  # if the stage was made longer, the path waits instead of going back
            self.path = max(self.path, self.at(self.spent / self.total))
        due = self.steps >= self.every or self.rate >= PART * self.total
        self.every = min(self.every, self.steps) if due else self.every
        return due

    def control(self, share: Tensor) -> None:
        """Make a control step: adjust lambda to the measured share of zeros (0-dim, float64)."""
        self.steps, self.rate = 0, 0.0
        off = share - self.path
        self.speed = torch.lerp(self.speed, off - self.off, SMOOTHING)
        self.low = torch.minimum(off, torch.lerp(self.low, off, FADE))
        self.off = off
        ahead = off + AHEAD * self.speed
        surplus = torch.minimum(ahead, self.low - BAND[self.single]).clamp(min=0)
        move = GAIN * ((-ahead).clamp(min=0) - surplus)
        fall = FALL[self.single][self.path >= self.target]
        lam = self.lam * move.clamp(-fall, RISE).exp()
        self.lam = lam.clamp(self.first / RANGE, self.first * RANGE)
