"""The README's figures, from the shipped checkpoint, its claim and its training logs.

    python figures.py [--checkpoint F] [--logs training/logs] [--out figures]

layers.png     sparsity and bits of every weight tensor
cost.png       where storage and operations go
training.png   loss and accuracy by epoch, stage after stage
"""
import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import claims  # noqa: E402
import counting  # noqa: E402
from files import load_json, run_script  # noqa: E402
from mobilenet_v2 import CHECKPOINT, BadInput, load_checkpoint  # noqa: E402

BLUE, ORANGE, GREY, GREEN, RED = "#3465a4", "#e07b00", "#9a9a9a", "#4e9a06", "#a40000"
COLOURS = {"conv": BLUE, "depthwise": ORANGE, "linear": GREEN}
HERE = Path(__file__).resolve().parent


def layers_figure(rows: list[dict], bits: dict[str, int]):
    """Sparsity of every weight tensor by its index in the bit table, and the bits that are claimed for it."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 5.2), sharex=True, height_ratios=(3, 1), layout="constrained")
    for kind, colour in COLOURS.items():
        same = [row for row in rows if row["kind"] == kind]
        top.bar([row["index"] for row in same], [100 * row["zeros"] / row["total"] for row in same], color=colour, label=kind)
    top.set(ylabel="zeros (%)", ylim=(0, 100), title="Sparsity and bits of the 58 weight tensors")
    top.legend(loc="upper left", ncols=3, frameon=False)
    bottom.bar([row["index"] for row in rows], [bits[row["name"]] for row in rows],
               color=[RED if bits[row["name"]] < 8 else GREY for row in rows])
    bottom.set(ylabel="bits", xlabel="index of the layer (0 the stem, 56 the head, 57 the linear layer)", ylim=(0, 9),
               yticks=(0, 4, 6, 8), xlim=(-0.8, len(rows) - 0.2))
    for axes in (top, bottom):
        axes.grid(axis="y", color="#dddddd")
        axes.set_axisbelow(True)
    return figure


def cost_figure(storage: dict[str, int], operations: dict[str, list[counting.Row]]):
    """Storage by kind of value, and operations by kind of operation under the three accumulator conventions."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    parts = {kind: bits / 8e3 for kind, bits in storage.items() if kind != "total"}
    bars = left.barh(list(parts), list(parts.values()), color=BLUE)
    left.bar_label(bars, fmt="{:,.0f} kB", padding=3)
    left.invert_yaxis()
    left.set(title=f"Storage: {storage['total'] / 8e3:,.0f} kB", xlabel="kB", xlim=(0, 1.2 * max(parts.values())))
    kinds = list(dict.fromkeys(row.kind for rows in operations.values() for row in rows))
    colours = dict(zip(kinds, (BLUE, GREY, GREEN, ORANGE, RED, "#75507b")))
    base = dict.fromkeys(operations, 0.0)
    for kind in kinds:
        heights = {c: sum(row.bits for row in rows if row.kind == kind) / 32e6 for c, rows in operations.items()}
        right.bar(list(heights), list(heights.values()), bottom=[base[c] for c in heights], color=colours[kind], label=kind)
        base = {c: base[c] + heights[c] for c in base}
    for i, total in enumerate(base.values()):
        right.text(i, total, f"{total:.2f}M", ha="center", va="bottom")
    right.set(title="Operations for one image", ylabel="millions of 32-bit operations", xlabel="accumulators",
              ylim=(0, 1.12 * max(base.values())), xlim=(-0.6, len(base) + 0.5))
    right.legend(frameon=False, loc="upper right")
    return figure


def training_figure(stages: list[list[dict]]):
    """Training loss (left) and accuracy (right) by epoch, the stages one after the other."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    start = 0
    for records, colour in zip(stages, (BLUE, ORANGE, GREEN, RED)):
        epochs = [start + record["epoch"] for record in records]
        left.plot(epochs, [record["loss"] for record in records], "o-", ms=3, color=colour, label=records[0]["stage"])
        tested = [(epoch, 100 * record["test_accuracy"]) for epoch, record in zip(epochs, records) if "test_accuracy" in record]
        right.plot(*zip(*tested), "o-", ms=3, color=colour, label=f"{records[0]['stage']}, test")
        right.plot(epochs, [100 * record["accuracy"] for record in records], ":", color=colour, label=f"{records[0]['stage']}, train")
        start = epochs[-1]
    left.set(title="Training loss", xlabel="epoch, all stages", ylim=(0, None))
    right.set(title="Accuracy (the train images are augmented)", xlabel="epoch, all stages", ylabel="%", ylim=(0, 100))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(color="#dddddd")
    return figure


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / CHECKPOINT, metavar="F", help="(%(default)s)")
    parser.add_argument("--logs", type=Path, default=HERE / "training" / "logs", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "figures", metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    model = load_checkpoint(args.checkpoint)
    path = claims.claim_path(args.checkpoint)
    formats, problems = claims.hold(load_json(path), path, model, counting.found_formats(model))
    if problems:
        raise BadInput(f"{args.checkpoint} contradicts its claim: {problems[0]}")
    operations = counting.trace(model)
    figures = {
        "layers": layers_figure(counting.weight_summary(model)["tensors"], {name: grid.bits for name, grid in formats.tensors.items()}),
        "cost": cost_figure(counting.storage(model, formats),
                            {c: counting.count(operations, formats, c) for c in counting.CONVENTIONS}),
    }
    logs = [args.logs / f"{stage}.jsonl" for stage in ("pretrain", "rew", "masked", "quantized")]
    stages = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs if log.is_file()]
    if stages:
        figures["training"] = training_figure(stages)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=110, metadata={"Software": None})
        print(f"wrote {args.out / f'{name}.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
