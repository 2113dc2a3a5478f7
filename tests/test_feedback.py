"""Lambda by feedback: path and controller by hand, and stages of a small network that arrive at their target."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressed import cifar100
from compressed.graph import weight_layers
from training import feedback, loop
from training.feedback import Feedback
from training.progress import zeros_text
from training.masks import already_zero, group_norms, target_masks
from training.penalties import make

LAYERS = ["conv2", "conv3", "conv4", "conv5", "linear"]
TRAIN = cifar100.made_up(512, 0, classes=10)
LR = {"sgd": 0.1, "muon": 0.1, "adam": 1e-3}
SCHEDULES = {"constant": {"schedule": "constant"}, "cosine": {"schedule": "cosine"},
             "cooldown": {"schedule": "constant", "cooldown": 3}}


class Small(nn.Module):
    """The kinds of layers that MobileNetV2 has, 23,000 weights; a step takes milliseconds."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, stride=4, bias=False), nn.BatchNorm2d(16)
            self.conv2, self.bn2 = nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64)
            self.conv3, self.bn3 = nn.Conv2d(64, 64, 3, 2, 1, groups=64, bias=False), nn.BatchNorm2d(64)
            self.conv4, self.bn4 = nn.Conv2d(64, 32, 1, bias=False), nn.BatchNorm2d(32)
            self.conv5, self.bn5 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
            self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return self.linear(F.relu(self.bn5(self.conv5(x))).mean((2, 3)))


def stage(folder, optimizer="sgd", schedule="cosine", kind="irregular", target=0.8, spec="proximal", **kwargs):
    """(trained model, its penalty, the epochs' lines) of a stage of 256 steps; the images are learnt by heart early."""
    model = Small()
    settings = loop.Settings(epochs=8, batch_size=16, lr=LR[optimizer], optimizer=optimizer, warmup_epochs=0.5,
                             augment="none", mixing="none", refresh=0, **SCHEDULES[schedule])
    penalty = make(spec, model, LAYERS, kind=kind, target=target)
    loop.train("rew", model, TRAIN, None, settings, folder, penalty=penalty, penalty_updates=20, **kwargs)
    return model, penalty, [json.loads(line) for line in (folder / "rew.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- whole stages

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", LR)
def test_the_penalty_makes_the_masks_zeros(tmp_path, optimizer, schedule):
    model, penalty, lines = stage(tmp_path, optimizer, schedule)
    share = penalty.zeros_share().item()
    assert 0.79 <= share <= 0.82
    _, pruned, already = already_zero(model, target_masks(model, LAYERS, 0.8))
    assert already >= 0.98 * pruned
    assert lines[-1]["zeros_share"] == share and lines[-1]["zeros_path"] == pytest.approx(0.8)
    assert all(abs(line["zeros_share"] - line["zeros_path"]) < 0.1 for line in lines)
    assert lines[0]["zeros_path"] < lines[1]["zeros_path"] < lines[-1]["zeros_path"]


def test_a_penalty_of_ones_own_makes_the_masks_zeros(tmp_path, lp):
    """One that has no updates of its own."""
    model, penalty, lines = stage(tmp_path, "adam", "constant", spec="lp.py:Lp?p=0.5")
    assert 0.79 <= penalty.zeros_share() <= 0.82
    assert all(abs(line["zeros_share"] - line["zeros_path"]) < 0.1 for line in lines)
    _, pruned, already = already_zero(model, target_masks(model, LAYERS, 0.8))
    assert already >= 0.98 * pruned


@pytest.mark.parametrize("spec, size", (("lp.py:Lp?p=0.5", 0.1), ("lp.py:Lp?p=0.5", 0.01), ("lp.py:Lp?p=1", 0.1)))
def test_the_first_lambda_of_the_page_is_of_its_own_penalty(lp, spec, size):
    """A weight on which the loss has no gradient is zero when the learning rates sum to the given rate, not earlier."""
    penalty = make(spec, Small(), LAYERS, target=0.8)
    weight, left = torch.tensor([size], dtype=torch.float64), []
    penalty.weights = [weight]
    for _ in range(1100):
        penalty.shrink(2.0 / 1000 * penalty.first_lambda(size, 2.0))
        left.append(float(weight))
    assert left[900] > 0 and left[-1] == 0


@pytest.mark.parametrize("kind, optimizer, schedule", (
    ("column", "sgd", "cosine"), ("column", "adam", "constant"), ("column", "muon", "cooldown"),
    ("kernel", "sgd", "constant"), ("kernel", "adam", "cosine"), ("kernel", "muon", "cooldown"),
    ("filter", "sgd", "constant"), ("filter", "adam", "cooldown"), ("filter", "muon", "cosine")))
def test_groups_go_whole_and_as_many(tmp_path, kind, optimizer, schedule):
    """What the mask prunes and the penalty did not is 2%, or the one group by which the mask goes beyond the target."""
    model, penalty, lines = stage(tmp_path, optimizer, schedule, kind, target=0.6)
    largest = max(layer.weight.numel() // group_norms(layer.weight.detach(), kind).numel()
                  for name, layer in weight_layers(model) if name in LAYERS)
    total, pruned, already = already_zero(model, target_masks(model, LAYERS, 0.6, kind))
    assert pruned - already <= max(0.02 * pruned, largest)
    assert penalty.zeros_share() <= 0.63 + largest / total
    # from a quarter of the stage on: in the first 64 steps whole layers of similar norms can become zero at once
    assert max(line["zeros_share"] - line["zeros_path"] for line in lines[2:]) < 0.15
    gone = sum(int((group_norms(weight, kind) == 0).sum()) for weight in penalty.weights)
    assert (lines[-1]["zero_groups"], lines[-1]["kind"]) == (gone, kind)
    assert f"{gone:,} of {lines[-1]['groups']:,} {kind}s" in zeros_text(lines[-1])


def test_a_stage_taken_up_in_its_middle_is_led_from_there(tmp_path):
    """By weights alone, without the state of the penalty: it does not wait for the next update."""
    _, penalty, lines = stage(tmp_path, "muon", "constant", start_epoch=3.3)
    assert penalty.feedback.total == pytest.approx(0.1 * (256 - 106))
    assert lines[0]["epoch"] == 4 and lines[0]["zeros_share"] > 0.1 and 0.79 <= penalty.zeros_share() <= 0.82


# ------------------------------------------------------------------------------------------ path and controller

def begun(target=0.8, share=0.0, total=100.0, lam=1.0) -> Feedback:
    led = Feedback(target)
    led.begin(share, total)
    led.set(lam, "cpu")
    return led


def test_the_path_by_hand():
    led = begun(share=0.3)
    assert led.path == pytest.approx(0.3) and led.at(0.375) == pytest.approx(0.8 - 0.5 / 8)
    assert led.at(0.75) == led.at(0.9) == 0.8
    for _ in range(60):
        led.due(1.25)
    assert led.path == pytest.approx(0.8)  # of the rate that is spent, not of the steps
    led.total = 200.0
    led.due(1.0)
    assert led.path == pytest.approx(0.8)  # a stage made longer takes nothing back
    assert begun(share=0.9).at(0.1) == 0.8  # nor one that began with more zeros than it wants


def test_a_control_step_is_due_by_steps_and_by_rate():
    assert [begun(total=1e6).due(1.0) for _ in range(3)] == [False] * 3
    led, due = begun(total=1e6), []
    for _ in range(20):
        due.append(led.due(1.0))
        if due[-1]:
            led.control(torch.tensor(0.0).double())
    assert [i for i, each in enumerate(due) if each] == [7, 15]
    assert begun(total=100.0).due(0.5) and not begun(total=100.0).due(0.4)
    led = begun(total=100.0)
    assert not led.due(0.3) and led.due(0.3)
    led.control(torch.tensor(0.0).double())
    assert not led.due(1e-6) and led.due(1e-6)  # every second step, as before, where the rate has fallen


def test_lambda_moves_against_the_error_and_within_bounds():
    led = begun()
    led.path = 0.5

    def moved(share):
        before = led.lam.item()
        led.control(torch.tensor(share, dtype=torch.float64))
        return math.log(led.lam.item() / before)

    assert moved(0.4) == pytest.approx(feedback.RISE)
    for _ in range(500):
        moved(0.4)
    assert led.lam.item() == pytest.approx(feedback.RANGE)  # no wind-up beyond
    for _ in range(30):
        held = moved(0.5 + feedback.BAND[True] / 2)
    assert held == 0  # a small surplus is let be
    for _ in range(30):
        fallen = moved(0.55)
    assert fallen == pytest.approx(-feedback.FALL[True][0])
    assert moved(0.49) > 0 and moved(0.55) == pytest.approx(-0.0, abs=0.1)
    for _ in range(100):
        slow = moved(0.499)
    assert slow == pytest.approx(feedback.GAIN * 0.001, rel=0.01)


@pytest.mark.parametrize("speed", (0.3, 1.0, 3.0))
def test_it_leads_zeros_that_follow_lambda_slowly(speed):
    """A made-up network: the zeros drift to a level that grows with log lambda, and lag behind by many steps."""
    led, share, worst = begun(total=4000.0, lam=0.01), 0.0, 0.0
    for step in range(4000):
        level = 1 / (1 + led.lam.item() ** -0.5)
        share += 0.02 * speed * (level - share)
        if led.due(1.0):
            led.control(torch.tensor(share, dtype=torch.float64))
        if step > 400:
            worst = max(worst, abs(share - led.path))
    assert worst < 0.02 and share == pytest.approx(0.8, abs=0.004)
