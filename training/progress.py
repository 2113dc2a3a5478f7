"""Show the progress of training, and format its log lines."""
import math
import time

from compressed.command_line import progress_bar

FIRST = 50  # steps after which progress is first shown: compilation and cold caches no longer distort the speed


def duration(seconds: float) -> str:
    """Return a time as text in a suitable unit: "40 s", "25 min", "7.3 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class Progress:
    """The progress of a stage's epoch: a bar on a terminal, otherwise a line every `seconds`.

    later: number of pixels (see Plan) of the stages that follow in this run, for the time left.
    """

    def __init__(self, stage, epoch: int, seconds: float, later: float = 0):
        self.stage, self.epoch, self.later, self.bar = stage, epoch, later, None
        self.last, self.at = stage.progress["step"] % stage.plan.epoch_steps, time.monotonic()
        if stage.processes.first:
            self.bar = progress_bar(total=stage.plan.epoch_steps, initial=self.last, leave=False,
                                    desc=f"{stage.name} {epoch + 1}/{stage.settings.epochs}")
        self.seconds = 0.5 if self.bar is not None else seconds if stage.processes.first else math.inf

    def step(self, done: int) -> None:
        """Show the progress if it is time to. done: number of the epoch's steps so far."""
        stage, plan, now = self.stage, self.stage.plan, time.monotonic()
        first = stage.first_steps == FIRST and stage.processes.first
        if now - self.at < self.seconds and not first:  # seldom, because reading the totals waits for the device
            return
        rate = (done - self.last) / (now - self.at)
        loss, correct = (stage.totals * stage.processes.count / stage.summed()).tolist()
        step, epochs, at = stage.progress["step"], stage.settings.epochs, self.epoch + done / plan.epoch_steps
        left = duration((sum(plan.pixels[step:]) + self.later) / plan.pixels[step - 1] / rate)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{correct:.1%}", left=left, refresh=False)
            self.bar.update(done - self.last)
        else:
            size, whole = plan.sizes[step - 1], "of the run " * bool(self.later)
            print(f"{stage.name} epoch {at:.2f}/{epochs}: {rate * plan.batch_size:,.0f} images/s at {size}x{size}, "
                  f"lr {plan.lrs[step - 1]:.4g}, loss {loss:.4f}, train {correct:.2%}, {at / epochs:.1%} done, "
                  f"{left} {whole}left", flush=True)
        self.last, self.at = done, now

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def describe(record: dict, epochs: int) -> str:
    """Return an epoch's log record as a line of text. epochs: those of the stage."""
    tested = f", test {record['test_accuracy']:.2%}" if "test_accuracy" in record else ""
    return (f"{record['stage']} epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}, "
            f"train {record['accuracy']:.2%}{tested}, {zeros_text(record)}, {record['seconds']:.0f} s")


def zeros_text(record: dict) -> str:
    """Return the zeros of an epoch's record as text: their share and, with a penalty, the wanted share and groups."""
    if "zeros_share" not in record:
        return f"zeros {record['zeros'] / max(1, record['weights']):.2%}"
    path = f" (path {record['zeros_path']:.2%})" if "zeros_path" in record else ""
    groups = f", {record['zero_groups']:,} of {record['groups']:,} {record['kind']}s" if "groups" in record else ""
    return f"zeros {record['zeros_share']:.2%} of the pruned layers{path}{groups}"
