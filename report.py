"""The README's tables and figures, from the shipped checkpoint, its claim and its training logs.

    python report.py            figures/*.png, and the tables of PAGES between <!-- NAME --> and <!-- end NAME -->
    python report.py --check    writes nothing; exit status 2 if a table there is not what it would write

layers.png     sparsity and bits of every weight tensor
cost.png       where storage and operations go
training.png   loss and accuracy by epoch, stage after stage
board.png      accuracy beside score, ours and the challenge's entries
"""
import argparse
import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import claims  # noqa: E402
import counting  # noqa: E402
from checkpoints import load  # noqa: E402
from files import load_json, load_lines, run_script, save_text, some_path  # noqa: E402
from mobilenet_v2 import CHECKPOINT, BadInput  # noqa: E402

KINDS = {"conv": "convolutions", "batchnorm": "BatchNorm (requantization)", "relu": "ReLU", "add": "residual additions",
         "mean": "average pooling", "linear": "linear layer"}
BLUE, ORANGE, GREY, GREEN, RED = "#3465a4", "#e07b00", "#9a9a9a", "#4e9a06", "#a40000"
COLOURS = {"conv": BLUE, "depthwise": ORANGE, "linear": GREEN}
HERE = Path(__file__).resolve().parent
PAGES = ("README.md", "ACCOUNT.md", "benchmarks/README.md", "training/logs/README.md")
# the challenge's entries for CIFAR-100, as published (ACCOUNT.md): name, accuracy in % (None: "80 or more"), score, its accumulators
BOARD = (("RIAIR", None, 0.0044, "tree"), ("KAIST AI", 80.07, 0.0054, "32-bit"), ("OSI AI", 80.04, 0.0058, "32-bit"),
         ("MSUNet-v3", 80.13, 0.0108, "32-bit"), ("Woody", 80.06, 0.0155, "tree"))
PLACES = {"RIAIR": (-8, 8, "right"), "KAIST AI": (-2, -16, "center"), "OSI AI": (8, 8, "left")}  # of labels that would overlap


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


def board_figure(accuracy: float, scores: dict[str, float]):
    """Accuracy (%) over score: the entries, each under the accumulators of its published score, and ours under all three."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    markers = {"32-bit": "s", "fixed": "D", "tree": "^"}
    for name, correct, score, convention in BOARD:
        axes.plot(score, correct or 80, markers[convention], color=GREY, ms=8)
        x, y, side = PLACES.get(name, (0, 8, "center"))
        axes.annotate(name + (" (80 or more)" if correct is None else ""), (score, correct or 80), xytext=(x, y),
                      textcoords="offset points", ha=side, fontsize=8)
    for convention, score in scores.items():
        axes.plot(score, accuracy, markers[convention], color=BLUE, ms=9, label=f"ours, {convention} accumulators")
    axes.axhline(80, color=RED, lw=0.8, ls="--", label="what an entry must reach")
    axes.set(xlabel="score: storage / 36.5M + operations / 10.49B (less is better)", ylabel="accuracy on the test set (%)",
             xlim=(0, 1.15 * max(*scores.values(), 0.0155)), ylim=(min(accuracy, 79) - 1, 82))
    axes.legend(frameon=False, loc="lower left", fontsize=8)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    return figure


def output_lines(accuracy: dict, counts: dict) -> list[str]:
    """Some lines of what `bash run.sh` prints; tests/test_testers.py holds them against testers.py and the counter."""
    storage, scores = counts["storage"]["total"], counts["score"]
    theirs = counts["weights"]["submission"]
    lines = [f"Loss: {accuracy['loss']:.4f} (test set)", f"Accuracy: {accuracy['correct']}/{accuracy['images']} ({accuracy['correct'] / accuracy['images']:.2%})",
             f"  {'the submission' + chr(39) + 's convention (see README)':<42}{theirs['total']:>12,}{theirs['zeros']:>12,}{theirs['nonzeros']:>12,}"
             f"{theirs['sparsity']:>10.4f}{theirs['compression']:>13.4f}",
             f"Parameter storage by the challenge's rules: {storage:,} bits = {storage / 32e6:.4f}M 32-bit parameters = "
             f"{storage / 8e6:.3f} MB (score term {storage / 32 / counting.STORAGE_BASE:.5f})",
             f"{'Score':<44}" + "".join(f"{convention:>12}" for convention in counting.CONVENTIONS)]
    for label, key in (("storage / 36.5M", "storage"), ("operations / 10.49B", "operations"), ("score", "score")):
        lines.append(f"  {label:<42}" + "".join(f"{scores[c][key]:>12.5f}" for c in counting.CONVENTIONS))
    return lines


def tables(claim: dict, counted: dict[str, list[counting.Row]], submission_operations: dict[str, int]) -> dict[str, str]:
    """The tables by name, in Markdown. counted: the rows of every operation by convention.

    What the submission reported is from its README.
    """
    counts, accuracy = claim["counts"], claim["accuracy"]
    exact, theirs, storage, score = counts["weights"]["all"], counts["weights"]["submission"], counts["storage"], counts["score"]
    by_stage = {stage["stage"]: stage for stage in claim["made_by"]["training"]}
    by_layer = [tensor["bits"] for tensor in claim["tensors"] if tensor["name"].endswith(".weight") and "kind" not in tensor]
    six = sum(b == 6 for b in by_layer)

    def percent(correct, images=accuracy["images"]):
        return f"{100 * correct / images:.2f}%"

    def stage_accuracy(stage):
        return f"{100 * by_stage[stage]['last_epoch']['test_accuracy']:.2f}%"

    check, test = "`python check_model_operations.py`", "`python testers.py`"
    results = table(("", "this repository", "the submission", "command"), [
        ("dense baseline, test accuracy", stage_accuracy("pretrain"), "81.92%", "`python training/main.py --pretrain`"),
        ("masked, not quantized", percent(claim["accuracy_by_step"][0]["correct"]), "-", "the same, and `python quantize.py`"),
        ("**shipped: masked and quantized**", f"**{percent(accuracy['correct'])}** ({accuracy['correct']:,} of {accuracy['images']:,})",
         "80.12%", test),
        ("weights, convolutions and linear, exact", f"{exact['total']:,}", "-", test),
        ("zeros, exact", f"{exact['zeros']:,} ({100 * exact['sparsity']:.2f}%)", "-", test),
        ("weights, by the submission's convention", f"{theirs['total']:,}", "3,905,632", test),
        ("zeros, by the submission's convention", f"{theirs['zeros']:,}", "3,005,523", test),
        ("non-zeros, by the submission's convention", f"{theirs['nonzeros']:,}", "900,109", test),
        ("sparsity, by the submission's convention", f"{theirs['sparsity']:.4f}", "0.7695", test),
        ("compression rate, by the submission's convention", f"{theirs['compression']:.4f}", "4.3391", test),
        ("bits of weights", f"6 in {six} layers, 8 in {len(by_layer) - six}", "6 in 9 layers, 8 in 49", test),
        ("parameter storage (32-bit parameters)", f"{storage['total'] / 32e6:.4f}M", "left open", test),
        ("operations, by the submission's convention", f"{submission_operations['bits'] / 32e6:.2f}M", "231.25M", check),
        ("operations, every operation and our non-zeros", f"{counts['operations']['32-bit']['bits'] / 32e6:.2f}M", "-", check),
        ("score, 32-bit accumulators", f"{score['32-bit']['score']:.4f}", "left open", check),
        ("score, fixed-length accumulators", f"{score['fixed']['score']:.4f}", "-", check),
        ("score, binary tree", f"{score['tree']['score']:.4f}", "-", check),
    ])
    summary = table(("", "this repository", "the submission", "command"), [
        ("**accuracy, shipped: masked and quantized**", f"**{percent(accuracy['correct'])}** ({accuracy['correct']:,} of {accuracy['images']:,})",
         "80.12%", test),
        ("dense baseline", stage_accuracy("pretrain"), "81.92%", "`python training/main.py --pretrain`"),
        ("zeros, by the submission's convention (exact)", f"{100 * theirs['sparsity']:.2f}% ({100 * exact['sparsity']:.2f}%)", "76.95%", test),
        ("bits of weights; of activations", f"6 in {six} layers, 8 in {len(by_layer) - six}; 8", "6 in 9 layers, 8 in 49; 8", test),
        ("parameter storage, operations (32-bit units)", f"{storage['total'] / 32e6:.4f}M, "
         f"{counts['operations']['32-bit']['bits'] / 32e6:.2f}M", "left open, 231.25M dense", check),
        ("score: 32-bit, fixed-length, tree accumulators", ", ".join(f"{score[c]['score']:.4f}" for c in counting.CONVENTIONS), "left open", check),
    ])
    steps, before = [], None
    for step in claim["accuracy_by_step"]:
        change = "" if before is None else f"{100 * (step['correct'] - before) / accuracy['images']:+.2f}"
        steps.append((step["step"], f"{step['correct']:,}", percent(step["correct"]), change))
        before = step["correct"]
    stages = []
    for name, stage in by_stage.items():
        last, settings = stage["last_epoch"], stage["settings"]
        stages.append((name, settings["epochs"], settings["batch_size"], settings["lr"], settings["seed"], f"{last['zeros']:,}",
                       f"{100 * last['test_accuracy']:.2f}%", f"{last['seconds'] / 60:.0f} min", stage["machine"]))
    conventions = [(c, f"{counts['operations'][c]['multiplication_bits'] / 32e6:.3f}M", f"{counts['operations'][c]['addition_bits'] / 32e6:.3f}M",
                    f"{counts['operations'][c]['bits'] / 32e6:.3f}M", f"{score[c]['storage']:.5f}", f"{score[c]['operations']:.5f}",
                    f"{score[c]['score']:.5f}") for c in counting.CONVENTIONS]
    labels = {"weights": "non-zero weights", "masks": "one mask bit a position", "batchnorm": "BatchNorm scales and shifts",
              "biases": "biases of the linear layer", "steps": "steps of all grids, at 32 bits", "total": "total"}
    parts = [(labels[kind], f"{n:,}", f"{n / 32e6:.4f}M", f"{n / 8e3:,.0f} kB") for kind, n in storage.items()]
    account = []
    for kind in dict.fromkeys(row.kind for row in counted["32-bit"]):
        same = {c: [row for row in rows if row.kind == kind] for c, rows in counted.items()}
        times = sum(sum(row.multiplications.values()) for row in same["32-bit"])
        plus = sum(sum(row.additions.values()) for row in same["32-bit"])
        account.append((KINDS[kind], len(same["32-bit"]), f"{times:,}", f"{plus:,}",
                        *(f"{sum(row.bits for row in rows) / 32e6:.3f}" for rows in same.values())))
    account.append(("all", len(counted["32-bit"]), f"{counts['operations']['32-bit']['multiplications']:,}",
                    f"{counts['operations']['32-bit']['additions']:,}",
                    *(f"{counts['operations'][c]['bits'] / 32e6:.3f}" for c in counting.CONVENTIONS)))
    contents = {
        "results": results,
        "summary": summary,
        "output": "```\n" + "\n".join(output_lines(accuracy, counts)) + "\n```",
        "steps": table(("step of `quantize.py`", "correct", "accuracy", "change"), steps),
        "stages": table(("stage", "epochs", "batch", "peak lr", "seed", "zeros", "test accuracy", "time", "machine"), stages),
        "score": table(("accumulators", "multiplications", "additions", "operations", "storage / 36.5M", "operations / 10.49B", "score"),
                       conventions),
        "storage": table(("storage", "bits", "32-bit parameters", ""), parts),
        "account": table(("operation", "how many", "multiplications", "additions", "32-bit", "fixed", "tree"), account),
    }
    removed = claim["dead_weight_removed"]
    share = removed["weights"] / (removed["weights"] + exact["nonzeros"])
    contents["dead"] = table(("dead", "values set to zero", "saved"), [
        ("weights", f"{removed['weights']:,}", f"{100 * share:.2f}% of the non-zero weights, and the operations on them"),
        ("BatchNorm scales and shifts", f"{removed['scales and shifts']:,}", "nothing: these tensors are stored dense")])
    speed = HERE / "benchmarks" / "training_speed.json"
    if speed.is_file():
        contents["speed"] = training_table(load_json(speed))
    speed = HERE / "benchmarks" / "depthwise_shapes.json"
    if speed.is_file():
        contents["depthwise"] = depthwise_table(load_json(speed))
    speed = HERE / "benchmarks" / "inference_speed.json"
    if speed.is_file():
        contents["inference"] = inference_table(load_json(speed))
    if "integer" in claim:
        contents["executed"] = table(("executed by", "images", "command"), [
            (f"{where}: {what}", f"{claim[kind][key]:,} of {claim[kind]['images']:,}", f"`python {command}`")
            for where, kind, command, same in (("integers", "integer", "integer.py --record", "identical"),
                                               ("onnxruntime, 8-bit", "onnx", "export_onnx.py --record", "same_logits"))
            if kind in claim
            for what, key in (("accuracy", "correct"), ("predictions that agree with `testers.py`", "agree"),
                              ("images whose logits agree to the last bit", same))])
        contents["accumulators"] = table(
            ("layer", "bound: lowest", "highest", "bits", "occurred: lowest", "highest", "bits", "sum"),
            [(row["layer"], *(f"{x:,}" for x in row["bound"]), row["bits"], *(f"{x:,}" for x in row["seen"]), row["seen_bits"],
              row["value_bits"]) for row in claim["integer"]["accumulators"]])
    if "packed" in claim:
        size = claim["packed"]["bytes"]
        contents["packed"] = table(("packed file", "bytes", "32-bit parameters", "beside the count"), [
            (f"`{claim['packed']['file']}`", f"{size:,}", f"{size / 4e6:.4f}M", f"{100 * (8 * size / storage['total'] - 1):+.3f}%")])
    return contents


def training_table(measured: dict) -> str:
    """Median images a second of every loop, the ratios, and where a step's time goes in the first mode measured."""
    rows = [(f"{name}, images/s", f"{statistics.median(speeds):.1f}") for name, speeds in measured["images_per_second"].items()]
    rows += [(name, f"**{ratio:.2f}**") for name, ratio in measured["ratios"].items()]
    mode, parts = next(iter(measured["steps"].items()))
    shares = {part: seconds for part, seconds in parts.items() if part != "whole"}
    rows += [(f"share of a step ({mode}): {part}", f"{100 * seconds / sum(shares.values()):.2f}%") for part, seconds in shares.items()]
    return table((f"batch {measured['batch_size']}, {measured['precision']}", f"median of {len(next(iter(measured['images_per_second'].values())))} rounds"), rows)


def depthwise_table(measured: dict) -> str:
    """Milliseconds of those with a stride and of the others, in channels-last."""
    rows = []
    for what, stride in (("14 without a stride", 1), ("3 with a stride", 2)):
        chosen = [row for row in measured["shapes"] if row["stride"] == stride]
        rows.append((what, *(f"{1000 * sum(row[f'{precision} channels-last'][part] for row in chosen):.1f}"
                             for precision in ("bfloat16", "float32") for part in ("forward", "backward"))))
    return table(("depthwise convolutions", "bfloat16, forward", "backward", "float32, forward", "backward"), rows)


def inference_table(measured: dict) -> str:
    """Images a second and ratios by batch; then the kinds of layers, by onnxruntime's own clock, as if each were all."""
    rows = []
    for name, figures in measured["speeds"].items():
        engine, batch = name.rsplit(", ", 1)
        rows.append((batch, engine, f"{statistics.median(figures['images_per_second']):,.0f}", f"{figures['ratio_to_torch']:.2f}",
                     f"{figures['ratio_to_onnx_float']:.2f}"))
    batch = max(int(name.rsplit(", ", 1)[1]) for name in measured["parts"])
    floats, codes = (measured["parts"][f"{engine}, {batch}"] for engine in ("onnx float", "onnx 8-bit"))
    rows += [(batch, f"onnx 8-bit: {part} alone", f"{1e6 / codes[part]:,.0f}", "", f"{floats[part] / codes[part]:.2f}") for part in floats]
    return table(("batch", "engine", "images/s", "beside torch", "beside onnx float"), rows)


def table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fill(page: str, contents: dict[str, str]) -> str:
    """The page with what stands between <!-- NAME --> and <!-- end NAME --> replaced, for every NAME that it has."""
    for name, text in contents.items():
        page = re.sub(f"(<!-- {name} -->\n).*?(<!-- end {name} -->)", lambda m: m[1] + text + "\n" + m[2], page, flags=re.S)
    return page


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=some_path, default=HERE / CHECKPOINT, metavar="F", help="(%(default)s)")
    parser.add_argument("--logs", type=some_path, default=HERE / "training" / "logs", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--out", type=some_path, default=HERE / "figures", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--pages", type=some_path, default=HERE, metavar="DIR", help="where the pages are (%(default)s)")
    parser.add_argument("--check", action="store_true", help="compare the tables, write nothing")
    args = parser.parse_args(argv)
    model, claim = load(args.checkpoint)
    formats, _ = claims.hold(claim, args.checkpoint, model, counting.found_formats(model))
    operations = counting.trace(model)
    counted = {c: counting.count(operations, formats, c) for c in counting.CONVENTIONS}
    contents = tables(claim, counted, counting.submission_operations(operations))
    pages = {page: page.read_text() for page in (args.pages / name for name in PAGES)}
    places = {name for text in pages.values() for name in re.findall(r"<!-- (\w+) -->\n(?=.*<!-- end \1 -->)", text, re.S)}
    for name in sorted(contents.keys() - places):
        raise BadInput(f"none of {', '.join(PAGES)} has a place <!-- {name} --> ... <!-- end {name} -->")
    for name in sorted(places - contents.keys()):
        raise BadInput(f"nothing is measured for the table {name!r}: run the commands of training/README.md, or the benchmark "
                       "beside it")
    filled = {page: fill(text, contents) for page, text in pages.items()}
    if args.check:
        for page, text in pages.items():
            if filled[page] != text:
                raise BadInput(f"{page}: its tables are not those of {claims.claim_path(args.checkpoint)}; run python report.py")
        print(f"the tables of {', '.join(PAGES)} are those of {claims.claim_path(args.checkpoint)}")
        return 0
    figures = {
        "layers": layers_figure(counting.weight_summary(model)["tensors"], {name: grid.bits for name, grid in formats.tensors.items()}),
        "cost": cost_figure(counting.storage(model, formats), counted),
    }
    correct, images = claim["accuracy"]["correct"], claim["accuracy"]["images"]
    figures["board"] = board_figure(100 * correct / images, {c: claim["counts"]["score"][c]["score"] for c in counting.CONVENTIONS})
    logs = [args.logs / f"{stage}.jsonl" for stage in ("pretrain", "rew", "masked", "quantized")]
    stages = [load_lines(log) for log in logs if log.is_file()]
    if stages:
        figures["training"] = training_figure(stages)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=110, metadata={"Software": None})
        print(f"wrote {args.out / f'{name}.png'}")
    for page, text in filled.items():
        save_text(text, page)
        print(f"wrote the tables of {page}")
    return 0


if __name__ == "__main__":
    run_script(main)
