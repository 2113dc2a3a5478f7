"""What a run says while it runs."""
import math
import os
import sys
import time

from training.plan import Settings


class Progress:
    """An epoch's progress: a bar on a terminal, elsewhere a line every `seconds`."""

    def __init__(self, stage, epoch: int, seconds: float):
        self.stage, self.epoch = stage, epoch
        self.last, self.at = stage.progress["step"] % stage.plan.epoch_steps, time.monotonic()
        self.seconds, self.bar = seconds if stage.processes.first else math.inf, None
        if stage.processes.first and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm
            self.bar = tqdm(total=stage.plan.epoch_steps, initial=self.last, leave=False,
                            desc=f"{stage.name} {epoch + 1}/{stage.settings.epochs}")
            self.seconds = 0.5

    def step(self, done: int) -> None:
        """`done` of the epoch's steps are made."""
        now = time.monotonic()
        if now - self.at < self.seconds:  # reading the totals waits for the device: seldom
            return
        stage, plan, epochs = self.stage, self.stage.plan, self.stage.settings.epochs
        rate = (done - self.last) / (now - self.at)
        loss, correct = (stage.totals * stage.processes.count / done).tolist()
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{correct:.1%}", refresh=False)
            self.bar.update(done - self.last)
        else:
            step, at = stage.progress["step"], self.epoch + done / plan.epoch_steps
            size, minutes = plan.sizes[step - 1], plan.to_come(step) / rate / 60
            print(f"{stage.name} epoch {at:.2f}/{epochs}: {rate * plan.batch_size:,.0f} images/s at {size}x{size}, "
                  f"lr {plan.lrs[step - 1]:.4g}, loss {loss:.4f}, train {correct:.2%}, {at / epochs:.1%} done, "
                  f"{minutes:,.0f} min left", flush=True)
        self.last, self.at = done, now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def describe(record: dict, settings: Settings) -> str:
    line = f"{record['stage']} epoch {record['epoch']}/{settings.epochs}: loss {record['loss']:.4f}"
    line += f", train {record['accuracy']:.2%}"
    if "test_accuracy" in record:
        line += f", test {record['test_accuracy']:.2%}"
    return line + f", {zeros(record)}, {record['seconds']:.0f} s"


def zeros(record: dict) -> str:
    """Word the zeros of an epoch's line: their share, and under a penalty the path's and how many groups."""
    if "zeros_share" not in record:
        return f"zeros {record['zeros'] / record['weights']:.2%}"
    text = f"zeros {record['zeros_share']:.2%} of the pruned layers"
    if "zeros_path" in record:
        text += f" (path {record['zeros_path']:.2%})"
    if "groups" in record:
        text += f", {record['zero_groups']:,} of {record['groups']:,} {record['kind']}s"
    return text
