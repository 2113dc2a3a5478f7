"""The README's tables and figures, from the shipped checkpoint, its claim and its training logs.

    python -m tools.report            figures/*.png, and the tables of PAGES between <!-- NAME --> and <!-- end NAME -->
    python -m tools.report --record   and first a line for the checkpoint in record/shipped.jsonl: accuracy, images
    python -m tools.report --check    writes nothing; exit status 2 if a table there is not what it would write

layers.png     sparsity and bits of every weight tensor
cost.png       where storage and operations go
training.png   loss and accuracy by epoch, stage after stage
shipped.png    accuracy of all that was shipped, by the images that it had been trained on
board.png      accuracy beside score, ours and the challenge's entries
"""
import contextlib
import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from compressed import (
    checkpoints,  # noqa: E402
    claims,  # noqa: E402
    counting,  # noqa: E402
)
from compressed.command_line import command_line, run_script, some_path  # noqa: E402
from compressed.counting import CONVENTIONS  # noqa: E402
from compressed.errors import BadInput  # noqa: E402
from compressed.files import load_json, load_lines, save_text, stage_logs  # noqa: E402
from compressed.graph import trace  # noqa: E402
from compressed.mnet import stated_formats  # noqa: E402

KINDS = {"conv": "convolutions", "batchnorm": "BatchNorm (requantization)", "relu": "ReLU", "add": "residual additions",
         "mean": "average pooling", "linear": "linear layer"}
STORED = {"weights": "non-zero weights", "masks": "one mask bit a position", "batchnorm": "BatchNorm scales and shifts",
          "biases": "biases of the linear layer", "steps": "steps of all grids, at 32 bits", "total": "total"}
BLUE, ORANGE, GREY, GREEN, RED = "#3465a4", "#e07b00", "#9a9a9a", "#4e9a06", "#a40000"
COLOURS = {"conv": BLUE, "depthwise": ORANGE, "linear": GREEN}
LAYERS = {"conv": "1x1 convolutions, and the stem", "depthwise": "depthwise convolutions", "linear": "linear layer"}
HERE = Path(__file__).resolve().parent.parent
LOGS = HERE / "record"
STAGES = {"pretrain": BLUE, "rew": ORANGE, "masked": GREEN, "quantized": RED}
SUBMISSION = 80.12  # its accuracy, in %
PAGES = ("README.md", "ACCOUNT.md", "benchmarks/README.md", "record/README.md")
# the challenge's entries for CIFAR-100, as published (ACCOUNT.md): name, accuracy in % (None: "80 or more"), score, its
# accumulators
BOARD = (("RIAIR", None, 0.0044, "tree"), ("KAIST AI", 80.07, 0.0054, "32-bit"), ("OSI AI", 80.04, 0.0058, "32-bit"),
         ("MSUNet-v3", 80.13, 0.0108, "32-bit"), ("Woody, own count", 80.06, 0.0155, "tree"),
         ("Woody, verified", 80.06, 0.0188, "tree"))
# of labels that would overlap
PLACES = {"RIAIR": (-8, 8, "right"), "KAIST AI": (-6, 10, "center"), "OSI AI": (8, 4, "left")}


def layers_figure(rows: list[dict], bits: dict[str, int]):
    """Sparsity of every weight tensor by its index in the bit table, and the bits that are claimed for it."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 5.2), sharex=True, height_ratios=(3, 1),
                                         layout="constrained")
    for kind, colour in COLOURS.items():
        same = [row for row in rows if row["kind"] == kind]
        top.bar([row["index"] for row in same], [100 * row["zeros"] / row["total"] for row in same], color=colour,
                label=LAYERS[kind])
    top.set(ylabel="zeros (%)", ylim=(0, 100), title="Sparsity and bits of the 58 weight tensors")
    top.legend(loc="upper left", ncols=3, frameon=False)
    bottom.bar([row["index"] for row in rows], [bits[row["name"]] for row in rows],
               color=[RED if bits[row["name"]] < 8 else GREY for row in rows])
    bottom.set(ylabel="bits (red: 6)", xlabel="index of the layer (0 the stem, 56 the head, 57 the linear layer)",
               ylim=(0, 9), yticks=(0, 4, 6, 8), xlim=(-0.8, len(rows) - 0.2))
    for axes in (top, bottom):
        axes.grid(axis="y", color="#dddddd")
        axes.set_axisbelow(True)
    return figure


def cost_figure(storage: dict[str, int], operations: dict[str, list[counting.Row]]):
    """Storage by kind of value, and operations by kind of operation under the three accumulator conventions."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    parts = {kind: bits / 8e3 for kind, bits in storage.items() if kind != "total"}
    bars = left.barh([STORED[kind] for kind in parts], list(parts.values()), color=BLUE)
    left.bar_label(bars, fmt="{:,.1f} kB", padding=3)
    left.invert_yaxis()
    left.set(title=f"Storage: {storage['total'] / 8e3:,.0f} kB", xlabel="kB", xlim=(0, 1.3 * max(parts.values())))
    kinds = list(dict.fromkeys(row.kind for rows in operations.values() for row in rows))
    colours = dict(zip(kinds, (BLUE, GREY, GREEN, ORANGE, RED, "#75507b")))
    base = dict.fromkeys(operations, 0.0)
    for kind in kinds:
        heights = {c: sum(row.bits for row in rows if row.kind == kind) / 32e6 for c, rows in operations.items()}
        right.bar(list(heights), list(heights.values()), bottom=[base[c] for c in heights], color=colours[kind],
                  label=f"{KINDS[kind]}: {heights['32-bit']:.2f}M of 32 bits")
        base = {c: base[c] + heights[c] for c in base}
    for i, total in enumerate(base.values()):
        right.text(i, total, f"{total:.2f}M", ha="center", va="bottom")
    right.set(title="Operations for one image", ylabel="millions of 32-bit operations", xlabel="accumulators",
              ylim=(0, 1.8 * max(base.values())))
    right.legend(frameon=False, loc="upper right")
    return figure


def training_figure(stages: list[list[dict]]):
    """Training loss (left) and accuracy (right) by epoch, the stages one after the other, a line where one begins."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    start, labelled = 0, set()
    for records in stages:
        stage, epochs = records[0]["stage"], [start + record["epoch"] for record in records]
        colour, hidden = STAGES[stage], "_" if stage in labelled else ""  # matplotlib leaves such labels out
        labelled.add(stage)
        left.plot(epochs, [record["loss"] for record in records], "o-", ms=3, color=colour, label=hidden + stage)
        tested = [(epoch, 100 * record["test_accuracy"]) for epoch, record in zip(epochs, records)
                  if "test_accuracy" in record]
        if tested:
            right.plot(*zip(*tested), "o-", ms=3, color=colour, label=f"{hidden}{stage}: test, weight average")
        right.plot(epochs, [100 * record["accuracy"] for record in records], ":", color=colour,
                   label=f"{hidden}{stage}: train, augmented and mixed")
        for axes in (left, right):
            axes.axvline(start, color=GREY, lw=0.5)
        start = epochs[-1]
    left.set(title="Training loss (jumps: mixing ends before a stage does)", xlabel="epoch, all stages",
             ylabel="cross-entropy with the mixed labels", ylim=(0, None))
    right.set(title="Accuracy", xlabel="epoch, all stages", ylabel="%", ylim=(0, 100))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="#dddddd")
    return figure


def shipped_figure(lines: list[dict]):
    """Accuracy (%) of every checkpoint that was shipped, before and after quantization, by millions of images."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    images = [line["images"] / 1e6 for line in lines]
    for key, colour, label in (("float", GREY, "masked, not quantized"), ("correct", BLUE, "shipped: quantized")):
        axes.plot(images, [100 * line[key] / line["tested"] for line in lines], "o:", color=colour, label=label)
    axes.axhline(SUBMISSION, color=RED, lw=0.8, ls="--", label="the submission")
    axes.set(xlabel="images trained, of all stages (millions)", ylabel="accuracy on the test set (%)",
             xlim=(0.9 * images[0], 1.05 * images[-1]))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(color="#dddddd")
    return figure


def board_figure(accuracy: float, scores: dict[str, float]):
    """Accuracy (%) over score: the entries under the accumulators of their published scores, ours under all three."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    markers = {"32-bit": "s", "fixed": "D", "tree": "^"}
    for name, correct, score, convention in BOARD:
        axes.plot(score, correct or 80, markers[convention], color=GREY, ms=8)
        x, y, side = PLACES.get(name, (0, 8, "center"))
        axes.annotate(name + (" (80 or more)" if correct is None else ""), (score, correct or 80), xytext=(x, y),
                      textcoords="offset points", ha=side, fontsize=8)
    for convention, score in scores.items():
        axes.plot(score, accuracy, markers[convention], color=BLUE, ms=9)
        axes.plot([], [], markers[convention], color="black", mfc="none", label=f"{convention} accumulators")
    axes.plot([], [], "s", color=BLUE, label="ours")
    axes.plot([], [], "s", color=GREY, label="the challenge's entries")
    axes.axhline(80, color=RED, lw=0.8, ls="--", label="what an entry must reach")
    axes.set(xlabel="score: storage / 36.5M + operations / 10.49B (less is better)",
             ylabel="accuracy on the test set (%)", xlim=(0, 1.15 * max(*scores.values(), BOARD[-1][2])),
             ylim=(min(accuracy, 80) - 0.7, max(accuracy, 80) + 0.7))
    axes.legend(frameon=False, loc="upper left" if accuracy > 81 else "lower left", fontsize=8)  # beside the entries
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    return figure


def output_lines(accuracy: dict, counts: dict) -> list[str]:
    """Some lines of what `bash run.sh` prints; tests/test_testers.py holds them against testers.py and the counter."""
    storage, scores = counts["storage"]["total"], counts["score"]
    theirs = counts["weights"]["submission"]
    lines = [f"Loss: {accuracy['loss']:.4f} (test set)",
             f"Accuracy: {accuracy['correct']}/{accuracy['images']} ({accuracy['correct'] / accuracy['images']:.2%})",
             f"  {'the submission' + chr(39) + 's convention (ACCOUNT.md)':<42}" + "".join(
                 f"{theirs[key]:>12,}" for key in ("total", "zeros", "nonzeros"))
             + f"{theirs['sparsity']:>10.4f}{theirs['compression']:>13.4f}",
             f"Parameter storage by the challenge's rules: {storage:,} bits = {storage / 32e6:.4f}M 32-bit parameters "
             f"= {storage / 8e6:.3f} MB (score term {storage / 32 / counting.STORAGE_BASE:.5f})",
             f"{'Score':<44}" + "".join(f"{convention:>12}" for convention in CONVENTIONS)]
    for label, key in (("storage / 36.5M", "storage"), ("operations / 10.49B", "operations"), ("score", "score")):
        lines.append(f"  {label:<42}" + "".join(f"{scores[c][key]:>12.5f}" for c in CONVENTIONS))
    return lines


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the tables are made of: the shipped checkpoint's claim, and its operations.

    counted: the rows of every operation by accumulator convention. theirs: the totals by the submission's convention.
    dense: what testers.py --json found of record/dense.pt, the dense network that the shipped one is compared with.
    history: the lines of record/shipped.jsonl.
    """
    claim: dict
    counted: dict[str, list[counting.Row]]
    theirs: dict[str, int]
    dense: dict
    history: list[dict]

    @property
    def stages(self) -> dict[str, dict]:
        return {stage["stage"]: stage for stage in self.claim["made_by"]["training"]}

    def percent(self, correct: int) -> str:
        return f"{100 * correct / self.claim['accuracy']['images']:.2f}%"

    def tested(self, stage: str) -> str:
        """The test accuracy at the end of a stage; a stage that was not finished may have none."""
        accuracy = self.stages[stage]["last_epoch"].get("test_accuracy") if stage in self.stages else None
        return "-" if accuracy is None else f"{100 * accuracy:.2f}%"

    def lost(self) -> str:
        """Of the dense network's accuracy, by masking and quantizing."""
        dense, shipped = (100 * found["correct"] / found["images"] for found in (self.dense, self.claim["accuracy"]))
        return f"{dense - shipped:.2f} points"

    def shipped(self) -> str:
        accuracy = self.claim["accuracy"]
        return f"**{self.percent(accuracy['correct'])}** ({accuracy['correct']:,} of {accuracy['images']:,})"

    def hours(self) -> str:
        """Of all stages, by their logs: on each kind of machine."""
        seconds = {}
        for stage in self.stages.values():
            where = "two CPU cores" if "CPU" in stage["machine"] else re.search(r"NVIDIA [^,]+", stage["machine"])[0]
            seconds[where] = seconds.get(where, 0) + stage["last_epoch"]["seconds"]
        return ", ".join(f"{x / 3600:.1f} h on {where}" if x > 3600 else f"{x / 60:.0f} min on one {where}"
                         for where, x in seconds.items())

    def by_penalty(self) -> str:
        zeros = self.stages["rew"]["last_epoch"]["zeros"]
        return f"{zeros:,} ({zeros / self.claim['counts']['weights']['all']['zeros']:.0%})"

    def bits(self) -> str:
        weights = [each["bits"] for each in self.claim["tensors"] if each["name"].endswith(".weight")
                   and "kind" not in each]
        return f"6 in {weights.count(6)} layers, 8 in {weights.count(8)}"


LOG = "[record](record/README.md)"
TEST, CHECK = "`python testers.py`", "`python check_model_operations.py`"
DENSE = "`python testers.py --checkpoint record/dense.pt`"
HEAD = ("", "this repository", "the submission", "command")  # what the submission reported is from its README


def summary(m: Measured) -> str:
    counts = m.claim["counts"]
    zeros = [f"{100 * counts['weights'][key]['sparsity']:.2f}%" for key in ("submission", "all")]
    return table(HEAD, [
        ("**accuracy, shipped: masked and quantized**", m.shipped(), "80.12%", TEST),
        ("dense baseline", m.percent(m.dense["correct"]), "81.92%", DENSE),
        ("images trained; time", f"{m.history[-1]['images'] / 1e6:.2f}M; {m.hours()}",
         "30M, and dense training", LOG),
        ("zeros, by the submission's convention (exact)", f"{zeros[0]} ({zeros[1]})", "76.95%", TEST),
        ("parameter storage; operations (32-bit units)", f"{counts['storage']['total'] / 32e6:.4f}M; "
         f"{counts['operations']['32-bit']['bits'] / 32e6:.2f}M", "left open", CHECK),
        ("score: 32-bit, fixed-length, tree accumulators",
         ", ".join(f"{counts['score'][c]['score']:.4f}" for c in CONVENTIONS), "left open", CHECK)])


def results(m: Measured) -> str:
    counts, by = m.claim["counts"], "by the submission's convention"
    exact, theirs = counts["weights"]["all"], counts["weights"]["submission"]
    return table(HEAD, [
        ("dense baseline, test accuracy", m.percent(m.dense["correct"]), "81.92%", DENSE),
        ("masked, not quantized", m.percent(m.claim["accuracy_by_step"][0]["correct"]), "-",
         "`python testers.py --checkpoint record/masked.pt`"),
        ("**shipped: masked and quantized**", m.shipped(), "80.12%", TEST),
        ("lost by masking and quantizing", m.lost(), "1.80 points", "these commands"),
        ("weights, convolutions and linear, exact", f"{exact['total']:,}", "-", TEST),
        ("zeros, exact", f"{exact['zeros']:,} ({100 * exact['sparsity']:.2f}%)", "-", TEST),
        ("of these, made by the penalty; the others by the mask's threshold", m.by_penalty(), "-",
         "`record/rew.jsonl`"),
        (f"weights, {by}", f"{theirs['total']:,}", "3,905,632", TEST),
        (f"zeros, {by}", f"{theirs['zeros']:,}", "3,005,523", TEST),
        (f"non-zeros, {by}", f"{theirs['nonzeros']:,}", "900,109", TEST),
        (f"sparsity, {by}", f"{theirs['sparsity']:.4f}", "0.7695", TEST),
        (f"compression rate, {by}", f"{theirs['compression']:.4f}", "4.3391", TEST),
        ("bits of weights", m.bits(), "6 in 9 layers, 8 in 49", TEST),
        ("parameter storage (32-bit parameters)", f"{counts['storage']['total'] / 32e6:.4f}M", "left open", TEST),
        (f"operations, {by}", f"{m.theirs['bits'] / 32e6:.2f}M", "231.25M", CHECK),
        ("operations, every operation and our non-zeros", f"{counts['operations']['32-bit']['bits'] / 32e6:.2f}M", "-",
         CHECK),
        *((f"score, {label}", f"{counts['score'][c]['score']:.4f}", "left open" if c == "32-bit" else "-", CHECK)
          for c, label in zip(CONVENTIONS, ("32-bit accumulators", "fixed-length accumulators", "binary tree")))])


def output(m: Measured) -> str:
    return "```\n" + "\n".join(output_lines(m.claim["accuracy"], m.claim["counts"])) + "\n```"


def steps(m: Measured) -> str:
    rows, by_step = [], m.claim["accuracy_by_step"]
    for step, before in zip(by_step, [None, *by_step]):
        change = f"{100 * (step['correct'] - before['correct']) / m.claim['accuracy']['images']:+.2f}" if before else ""
        rows.append((step["step"], f"{step['correct']:,}", m.percent(step["correct"]), change))
    return table(("step of `quantize.py`", "correct", "accuracy", "change"), rows)


def stages(m: Measured) -> str:
    rows = []
    for name, stage in m.stages.items():
        last, settings = stage["last_epoch"], stage["settings"]
        planned = settings["epochs"]
        epochs = planned if last["epoch"] == planned else f"{last['epoch']} of {planned}"
        rows.append((name, epochs, *(settings[key] for key in ("batch_size", "lr", "seed")), f"{last['zeros']:,}",
                     m.tested(name), f"{last['seconds'] / 60:.0f} min", stage["machine"]))
    return table(("stage", "epochs", "batch", "peak lr", "seed", "zeros", "test accuracy", "time", "machine"), rows)


def score(m: Measured) -> str:
    rows = []
    for c in CONVENTIONS:
        cost, scored = m.claim["counts"]["operations"][c], m.claim["counts"]["score"][c]
        rows.append((c, *(f"{cost[key] / 32e6:.3f}M" for key in ("multiplication_bits", "addition_bits", "bits")),
                     *(f"{scored[key]:.5f}" for key in ("storage", "operations", "score"))))
    return table(("accumulators", "multiplications", "additions", "operations", "storage / 36.5M",
                  "operations / 10.49B", "score"), rows)


def storage(m: Measured) -> str:
    return table(("storage", "bits", "32-bit parameters", ""), [
        (STORED[kind], f"{bits:,}", f"{bits / 32e6:.4f}M", f"{bits / 8e3:,.0f} kB")
        for kind, bits in m.claim["counts"]["storage"].items()])


def account(m: Measured) -> str:
    def row(label, chosen: dict[str, list[counting.Row]]):
        sums = {c: counting.totals(rows) for c, rows in chosen.items()}
        one = sums["32-bit"]
        return (label, len(chosen["32-bit"]), f"{one['multiplications']:,}", f"{one['additions']:,}",
                *(f"{each['bits'] / 32e6:.3f}" for each in sums.values()))

    kinds = dict.fromkeys(each.kind for each in m.counted["32-bit"])
    rows = [row(KINDS[kind], {c: [each for each in rows if each.kind == kind] for c, rows in m.counted.items()})
            for kind in kinds]
    return table(("operation", "how many", "multiplications", "additions", "32-bit", "fixed", "tree"),
                 [*rows, row("all", m.counted)])


def dead(m: Measured) -> str:
    removed = m.claim["dead_weight_removed"]
    share = removed["weights"] / (removed["weights"] + m.claim["counts"]["weights"]["all"]["nonzeros"])
    return table(("dead", "values set to zero", "saved"), [
        ("weights", f"{removed['weights']:,}", f"{share:.2%} of the non-zero weights, and the operations on them"),
        ("BatchNorm scales and shifts", f"{removed['scales and shifts']:,}",
         "nothing: these tensors are stored dense")])


def packed(m: Measured) -> str:
    file, counted = m.claim["packed"], m.claim["counts"]["storage"]["total"]
    return table(("packed file", "bytes", "32-bit parameters", "beside the count"), [
        (f"`{file['file']}`", f"{file['bytes']:,}", f"{file['bytes'] / 4e6:.4f}M",
         f"{100 * (8 * file['bytes'] / counted - 1):+.3f}%")])


def executed(m: Measured) -> str:
    rows = []
    for where, kind, command, same in (("integers", "integer", "tools.integer --record", "identical"),
                                       ("onnxruntime, 8-bit", "onnx", "tools.export_onnx --record", "same_logits")):
        for what, key in (("accuracy", "correct"), ("predictions that agree with `testers.py`", "agree"),
                          ("images whose logits agree to the last bit", same)):
            found = m.claim[kind]
            rows.append((f"{where}: {what}", f"{found[key]:,} of {found['images']:,}", f"`python -m {command}`"))
    return table(("executed by", "images", "command"), rows)


def accumulators(m: Measured) -> str:
    """The ten layers whose bounds are the widest; the claim has all."""
    widest = sorted(m.claim["integer"]["accumulators"], key=lambda row: row["bound"][0] - row["bound"][1])[:10]
    return table(("layer", "bound: lowest", "highest", "bits", "occurred: lowest", "highest", "bits", "sum"), [
        (row["layer"], *(f"{x:,}" for x in row["bound"]), row["bits"], *(f"{x:,}" for x in row["seen"]),
         row["seen_bits"], row["value_bits"]) for row in widest])


def shipped(m: Measured) -> str:
    rows = table(("images trained", "zeros", "masked, not quantized", "shipped", "checkpoint's SHA-256"), [
        (f"{line['images'] / 1e6:.2f}M", f"{line['sparsity']:.2%}", m.percent(line["float"]),
         m.percent(line["correct"]), f"`{line['sha256'][:12]}`") for line in m.history])
    images = images_to_reach(SUBMISSION, m.history)
    return rows if images is None else (
        f"{rows}\n\nA straight line through the last two, over the logarithm of the images, reaches {SUBMISSION}% at "
        f"{images / 1e6:.1f}M images. Two points under unlike schedules, and the gains shrink: this is optimistic.")


TABLES = (summary, results, output, steps, stages, score, storage, account, dead, packed, executed, accumulators,
          shipped)


def images_to_reach(accuracy: float, history: list[dict]) -> float | None:
    """By the line through the last two shipped accuracies (%) over the logarithm of the images; None if that does not
    rise, or is there already."""
    shipped = {line["images"]: 100 * line["correct"] / line["tested"] for line in history}  # one may be shipped again
    points = [(math.log(images), accuracy) for images, accuracy in list(shipped.items())[-2:]]
    if len(points) < 2 or not points[0][1] < points[1][1] < accuracy:
        return None
    (x, y), (last, reached) = points
    return math.exp(last + (accuracy - reached) * (last - x) / (reached - y))


def record(claim: dict, history: list[dict], logs: Path) -> list[dict]:
    """The history, and a line for this claim if its checkpoint is not the last. Images are those of whole epochs."""
    if history and history[-1]["sha256"] == claim["sha256"]:
        return history
    trained = [(load_lines(log)[-1]["step"], load_json(log.with_suffix(".options.json"))["settings"]["batch_size"])
               for log in stage_logs(logs)]
    return [*history, {
        "step": sum(steps for steps, _ in trained), "images": sum(steps * batch for steps, batch in trained),
        "sparsity": claim["counts"]["weights"]["submission"]["sparsity"],
        "float": claim["accuracy_by_step"][0]["correct"], "correct": claim["accuracy"]["correct"],
        "tested": claim["accuracy"]["images"], "sha256": claim["sha256"]}]


def stage_table(lines: list[dict]) -> str:
    """How a stage went, from its log: the epochs whose accuracy was measured, and the last one."""
    rows = []
    for line in lines:
        if "test_accuracy" in line or line is lines[-1]:
            accuracy = f"{line['test_accuracy']:.2%}" if "test_accuracy" in line else "-"
            rows.append((line["epoch"], f"{line['seconds'] / 60:.0f}", f"{line['lr']:.2g}", line["size"],
                         f"{line['loss']:.4f}", f"{line['accuracy']:.2%}", accuracy))
    return table(("epoch", "minutes", "learning rate", "images' size", "loss", "train", "average, test"), rows)


def training_table(measured: dict) -> str:
    """Median and range of every loop's images a second, the ratios, and where a step's time goes."""
    rows = [(f"{name}, images/s", f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})")
            for name, speeds in measured["images_per_second"].items()]
    rows += [(name, f"**{ratio:.2f}**") for name, ratio in measured["ratios"].items()]
    shares = {part: seconds for part, seconds in measured["step"].items() if part != "whole"}
    rows += [(f"share of a step: {part}", f"{100 * seconds / sum(shares.values()):.2f}%")
             for part, seconds in shares.items()]
    return table((f"batch {measured['batch_size']}, {measured['precision']}",
                  f"median of {len(next(iter(measured['images_per_second'].values())))} rounds (range)"), rows)


def depthwise_table(measured: dict) -> str:
    """Milliseconds of those with a stride and of the others, in channels-last."""
    rows = []
    for what, stride in (("14 without a stride", 1), ("3 with a stride", 2)):
        chosen = [row for row in measured["shapes"] if row["stride"] == stride]
        rows.append((what, *(f"{1000 * sum(row[name][part] for row in chosen):.1f}"
                             for name in ("bfloat16", "float32", "bfloat16 compiled")
                             for part in ("forward", "backward"))))
    return table(("depthwise convolutions", "bfloat16, forward", "backward", "float32, forward", "backward",
                  "compiled, bfloat16, forward", "backward"), rows)


def inference_table(measured: dict) -> str:
    """Images a second and ratios by batch; then the kinds of layers by onnxruntime's own clock, as if each were all."""
    rows = []
    for name, figures in measured["speeds"].items():
        engine, batch = name.rsplit(", ", 1)
        rows.append((batch, engine, f"{statistics.median(figures['images_per_second']):,.0f}",
                     f"{figures['ratio_to_torch']:.2f}", f"{figures['ratio_to_onnx_float']:.2f}"))
    batch = max(int(name.rsplit(", ", 1)[1]) for name in measured["parts"])
    floats, codes = (measured["parts"][f"{engine}, {batch}"] for engine in ("onnx float", "onnx 8-bit"))
    rows += [(batch, f"onnx 8-bit: {part} alone", f"{1e6 / codes[part]:,.0f}", "", f"{floats[part] / codes[part]:.2f}")
             for part in floats]
    return table(("batch", "engine", "images/s", "beside torch", "beside onnx float"), rows)


def table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fill(page: str, contents: dict[str, str]) -> str:
    """The page with what stands between <!-- NAME --> and <!-- end NAME --> replaced, for every NAME that it has."""
    for name, text in contents.items():
        between = f"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        page = re.sub(between, lambda m: m[1] + text + "\n" + m[2], page, flags=re.S)
    return page


BENCHMARKS = {"speed": ("training_speed.json", training_table),
              "speed_avx2": ("training_speed_avx2.json", training_table),
              "depthwise": ("depthwise_shapes.json", depthwise_table),
              "inference": ("inference_speed.json", inference_table)}


def tables(measured: Measured, logs: Path) -> dict[str, str]:
    """{NAME: table} of all for which something is measured."""
    contents = {}
    for make in TABLES:
        with contextlib.suppress(LookupError):  # packed.py and others add their parts to the claim later
            contents[make.__name__] = make(measured)
    for name, log in (("trunk", "pretrain.jsonl"), ("dense", "dense.jsonl")):
        if (logs / log).is_file():
            contents[name] = stage_table(load_lines(logs / log))
    for name, (file, make) in BENCHMARKS.items():
        if (HERE / "benchmarks" / file).is_file():
            contents[name] = make(load_json(HERE / "benchmarks" / file))
    return contents


def filled_pages(folder: Path, contents: dict[str, str]) -> dict[Path, tuple[str, str]]:
    """{page: (its text, what it should be)}. Raises BadInput for a table without a place, and a place without one."""
    pages = {page: page.read_text() for page in (folder / name for name in PAGES)}
    place = re.compile(r"<!-- (\w+) -->\n(?=.*<!-- end \1 -->)", re.S)
    places = {name for text in pages.values() for name in place.findall(text)}
    for name in sorted(contents.keys() - places):
        raise BadInput(f"none of {', '.join(PAGES)} has a place <!-- {name} --> ... <!-- end {name} -->")
    for name in sorted(places - contents.keys()):
        raise BadInput(f"nothing is measured for the table {name!r}: run the commands of training/README.md, or the "
                       "benchmark beside it")
    return {page: (text, fill(text, contents)) for page, text in pages.items()}


def main(argv=None) -> int:
    parser = command_line(__doc__)
    checkpoints.add_option(parser)
    parser.add_argument("--logs", type=some_path, default=LOGS, metavar="DIR",
                        help="logs of the stages, shipped.jsonl and dense.tested.json (record)")
    parser.add_argument("--out", type=some_path, metavar="DIR", help="(figures)")
    parser.add_argument("--pages", type=some_path, default=HERE, metavar="DIR",
                        help="where the pages are (beside this script)")
    parser.add_argument("--to", type=some_path, metavar="DIR",
                        help="write pages and figures there, and leave those here as they are")
    parser.add_argument("--record", action="store_true", help="first add the checkpoint to record/shipped.jsonl")
    parser.add_argument("--check", action="store_true", help="compare the tables, write nothing")
    args = parser.parse_args(argv)
    model, claim = checkpoints.load(args.checkpoint)
    formats, operations, claim_file = stated_formats(model, claim), trace(model), claims.claim_path(args.checkpoint)
    counted = {c: counting.count(operations, formats, c) for c in CONVENTIONS}
    history = load_lines(args.logs / "shipped.jsonl") if (args.logs / "shipped.jsonl").is_file() else []
    if args.record:
        history = record(claim, history, args.logs)
        save_text("".join(json.dumps(line) + "\n" for line in history), args.logs / "shipped.jsonl")
    measured = Measured(claim, counted, counting.submission_operations(operations),
                        load_json(args.logs / "dense.tested.json"), history)
    pages = filled_pages(args.pages, tables(measured, args.logs))
    if args.check:
        for page, (text, wanted) in pages.items():
            if text != wanted:
                raise BadInput(f"{page}: its tables are not those of {claim_file}; run python -m tools.report")
        print(f"the tables of {', '.join(PAGES)} are those of {claim_file}")
        return 0
    scores = {c: claim["counts"]["score"][c]["score"] for c in CONVENTIONS}
    figures = {
        "layers": layers_figure(counting.weight_summary(model)["tensors"],
                                {name: grid.bits for name, grid in formats.tensors.items()}),
        "cost": cost_figure(counting.storage(model, formats), counted),
        "board": board_figure(100 * claim["accuracy"]["correct"] / claim["accuracy"]["images"], scores)}
    if history:
        figures["shipped"] = shipped_figure(history)
    logs = stage_logs(args.logs)
    if any(log.is_file() for log in logs):
        figures["training"] = training_figure([load_lines(log) for log in logs if log.is_file()])
    out = args.out or (args.to or HERE) / "figures"
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
        print(f"wrote {out / f'{name}.png'}")
    for page, (_, wanted) in pages.items():
        if args.to:
            page = args.to / page.relative_to(args.pages)
        save_text(wanted, page)
        print(f"wrote the tables of {page}")
    return 0


if __name__ == "__main__":
    run_script(main)
