"""Draw the figures of the pages. Each function turns plain data into a matplotlib figure; tools.report saves them.

layers_figure     sparsity and bits of every weight tensor
cost_figure       where storage and operations go
training_figure   loss and accuracy by epoch, stage after stage
sparsity_figure   zeros by epoch of reweighted stages, the path that they follow, and lambda
methods_figure    hold-out accuracy of pruning methods at equal training
board_figure      accuracy against score, of what is shipped here and the challenge's entries
"""
from compressed import environment

environment.draw_into_files()
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE, ORANGE, GREY, GREEN, RED, PURPLE = "#3465a4", "#e07b00", "#9a9a9a", "#4e9a06", "#a40000", "#75507b"
COLOURS = (BLUE, GREY, GREEN, ORANGE, RED, PURPLE, *plt.colormaps["Set3"].colors)  # more than there are kinds
LAYERS = {"conv": ("1x1 convolutions, and the stem", BLUE), "depthwise": ("depthwise convolutions", ORANGE),
          "linear": ("linear layer", GREEN)}
STAGES = {"pretrain": BLUE, "rew": ORANGE, "masked": GREEN, "quantized": RED}
MARKERS = {"32-bit": "s", "fixed": "D", "tree": "^"}
# (x, y) from the point and alignment, in points, of labels that would overlap
PLACES = {"RIAIR, 1st": (-6, 3, "center"), "KAIST AI ver1, 2nd": (-4, -15, "right"),
          "KAIST AI ver2, 3rd": (4, -15, "left"), "OSI AI, 4th": (8, -2, "left")}


def grid(*all_axes, **options) -> None:
    for axes in all_axes:
        axes.grid(color="#dddddd", **options)
        axes.set_axisbelow(True)


def layers_figure(rows: list[dict], bits: dict[str, int]) -> Figure:
    """Plot the sparsity and the claimed bits of every weight tensor against its index in the bit table."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 5.2), sharex=True, height_ratios=(3, 1),
                                         layout="constrained")
    for kind, (label, colour) in LAYERS.items():
        same = [row for row in rows if row["kind"] == kind]
        top.bar([row["index"] for row in same], [100 * row["zeros"] / row["total"] for row in same], color=colour,
                label=label)
    top.set(ylabel="zeros (%)", ylim=(0, 100), title=f"Sparsity and bits of the {len(rows)} weight tensors")
    top.legend(loc="upper left", ncols=3, frameon=False)
    bottom.bar([row["index"] for row in rows], [bits[row["name"]] for row in rows],
               color=[RED if bits[row["name"]] < 8 else GREY for row in rows])
    bottom.set(ylabel="bits (red: below 8)", xlabel="index of the layer (0 the stem, 56 the head, 57 the linear layer)",
               ylim=(0, 9), yticks=(0, 4, 6, 8), xlim=(-0.8, len(rows) - 0.2))
    grid(top, bottom, axis="y")
    return figure


def cost_figure(storage: dict[str, int], operations: dict[str, dict[str, int]]) -> Figure:
    """Plot storage by kind of value, and operations by kind under the three accumulator conventions.

    storage: {kind: bits}. operations: {convention: {kind: count x bits}}, the kinds in one order.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    parts = {kind: bits / 8e3 for kind, bits in storage.items()}
    left.bar_label(left.barh(list(parts), list(parts.values()), color=BLUE), fmt="{:,.1f} kB", padding=3)
    left.invert_yaxis()
    left.set(title=f"Storage: {sum(parts.values()):,.0f} kB", xlabel="kB", xlim=(0, 1.3 * max(parts.values())))
    base = dict.fromkeys(operations, 0.0)
    for kind, colour in zip(operations["32-bit"], COLOURS):
        heights = {convention: bits[kind] / 32e6 for convention, bits in operations.items()}
        right.bar(list(heights), list(heights.values()), bottom=list(base.values()), color=colour,
                  label=f"{kind}: {heights['32-bit']:.2f}M")
        base = {convention: base[convention] + heights[convention] for convention in base}
    for i, total in enumerate(base.values()):
        right.text(i, total, f"{total:.2f}M", ha="center", va="bottom")
    right.set(title="Operations for one image", ylabel="millions of 32-bit operations", xlabel="accumulators",
              ylim=(0, 1.95 * max(base.values())))
    right.legend(frameon=False, loc="upper right", title="with 32-bit accumulators")
    return figure


def training_figure(stages: list[list[dict]]) -> Figure:
    """Plot training loss and accuracy by epoch, one stage after the other, with a line at the start of each."""
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
    left.set(title="Training loss (grey: a stage begins; drops: mixing ends)", xlabel="epoch, all stages",
             ylabel="cross-entropy with the mixed labels", ylim=(0, None))
    right.set(title="Accuracy", xlabel="epoch, all stages", ylabel="%", ylim=(0, 100))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    grid(left, right)
    return figure


def sparsity_figure(stages: dict[str, list[dict]]) -> Figure:
    """Plot the sparsity of reweighted stages by epoch with the path that they should follow, and their lambda.

    stages: {name: lines of a log with zeros_share, zeros_path (both of the pruned layers) and lambda}.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for (name, lines), colour in zip(stages.items(), (BLUE, ORANGE, GREEN, RED, PURPLE)):
        epochs = [line["epoch"] for line in lines]
        left.plot(epochs, [100 * line["zeros_share"] for line in lines], "o-", ms=3, color=colour, label=name)
        left.plot(epochs, [100 * line["zeros_path"] for line in lines], "--", color=colour, label="_")
        right.semilogy(epochs, [line["lambda"] for line in lines], "o-", ms=3, color=colour, label=name)
    left.plot([], [], "--", color=GREY, label="wanted")
    left.set(title="Zeros of the pruned layers", xlabel="epoch", ylabel="%", ylim=(0, 100))
    right.set(title="λ, adjusted by feedback", xlabel="epoch")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    grid(left, right)
    return figure


def methods_figure(accuracies: dict[float, dict[str, dict[int, float]]]) -> Figure:
    """Plot the hold-out accuracy of pruning methods, {target: {method: {seed: accuracy}}}; 0: dense.

    A panel shows a target, and a line a seed: the methods of a seed start from the same network.
    """
    dense = accuracies.get(0, {}).get("dense", {})
    targets = [target for target in accuracies if target]
    figure, panels = plt.subplots(1, len(targets), figsize=(8, 3.8), sharey=True, squeeze=False, layout="constrained")
    for axes, target in zip(panels[0], targets):
        found = accuracies[target]
        for seed in sorted({seed for values in found.values() for seed in values}):
            places = [k for k, values in enumerate(found.values()) if seed in values]
            axes.plot(places, [100 * values[seed] for values in found.values() if seed in values], "o-", lw=1,
                      color=COLOURS[seed % len(COLOURS)], label=f"seed {seed}")
            if seed in dense:
                axes.axhline(100 * dense[seed], lw=1, ls="--", color=COLOURS[seed % len(COLOURS)])
        axes.set(title=f"{target:.0%} zeros" + " (dashed: without pruning)" * bool(dense))
        axes.set_xticks(range(len(found)), found, rotation=25, fontsize=8)
    panels[0, 0].set(ylabel="hold-out accuracy after equal training (%)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    grid(*panels[0], axis="y")
    return figure


def board_figure(shipped: dict[str, tuple], entries: dict[str, tuple]) -> Figure:
    """Plot accuracy (%) against score: what is shipped under all accumulator conventions, the entries as published.

    shipped: {name: (accuracy, {convention: score})}. entries: {name: (its accuracies, [(score, convention)])}; their
    points are at the first accuracy, with a line to the last.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, (accuracies, points) in entries.items():
        for score, convention in points:
            axes.plot(score, accuracies[0], MARKERS[convention], color=GREY, ms=8, mec="white", mew=0.5)
            axes.plot([score, score], [accuracies[0], accuracies[-1]], color=GREY, lw=1)
        x, y, side = PLACES.get(name, (0, 8, "center"))
        axes.annotate(name, (points[-1][0], accuracies[-1]), xytext=(x, y), textcoords="offset points", ha=side,
                      fontsize=8)
    for (name, (accuracy, scores)), colour in zip(shipped.items(), (BLUE, GREEN, ORANGE, PURPLE)):
        for convention, score in scores.items():
            axes.plot(score, accuracy, MARKERS[convention], color=colour, ms=9)
        axes.plot([], [], "s", color=colour, label=name)
    axes.plot([], [], "s", color=GREY, label="the challenge's entries")
    for convention, marker in MARKERS.items():
        axes.plot([], [], marker, color="black", mfc="none", label=f"{convention} accumulators")
    axes.axhline(80, color=RED, lw=0.8, ls="--", label="accuracy that an entry must reach")
    heights = [80, *(accuracy for accuracy, _ in shipped.values())]
    axes.set(xlabel="score: storage / 36.5M + operations / 10.49B (less is better)", xlim=(0, 1.1 * axes.get_xlim()[1]),
             ylabel="accuracy on the test set (%)", ylim=(min(heights) - 0.7, max(heights) + 0.7))
    axes.legend(frameon=False, loc="upper left" if max(heights) > 81 else "lower left", fontsize=8)  # off the entries
    grid(axes)
    return figure
