"""Markdown tables of what the benchmarks have measured, and of accuracies over seeds.

A row of benchmarks/sparsity_methods.py: {"method": "proximal", "loss-LAMBDA", "magnitude", "one-shot" or "dense"
(target 0), "target": share of zeros, "seed", "accuracy": on the hold-out, ...}.
"""
import statistics


def table(head, rows) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def device(machine: dict) -> str:
    """Return the number and kind of a machine's devices as text: "2 CPU cores", "1 NVIDIA H200"."""
    if machine["device"] != "CPU":
        return f"{machine['processes']} {machine['device']}"
    cores = machine["cores"] * machine["processes"]
    return f"{cores} CPU core{'s' * (cores > 1)}"


# ---- Accuracies by seed --------------------------------------------------------------------------

def by_lambda(method: str) -> tuple[str, float]:
    """Return what methods are sorted by: the name, and then the lambda of loss-LAMBDA."""
    kind = "loss" if method.startswith("loss-") else method
    return kind, float(method.removeprefix("loss-")) if kind != method else 0.0


def by_seed(rows: list[dict]) -> dict[float, dict[str, dict[int, float]]]:
    """Return {target: {method: {seed: accuracy}}} of the comparison's rows, sorted."""
    values = {}
    for row in sorted(rows, key=lambda row: (row["target"], *by_lambda(row["method"]), row["seed"])):
        values.setdefault(row["target"], {}).setdefault(row["method"], {})[row["seed"]] = row["accuracy"]
    return values


def mean_of(values: dict[int, float]) -> str:
    """Return the text of accuracies by seed: mean ± standard deviation (seeds); one seed has no deviation."""
    found = list(values.values())
    spread = f" ± {statistics.stdev(found):.2%}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2%}{spread} ({len(found)})"


def differences(values: dict[int, float], others: dict[int, float]) -> str:
    """Return the text of what accuracies are above others, in points, for each seed that both have."""
    return ", ".join(f"{100 * (values[seed] - others[seed]):+.2f}" for seed in values if seed in others)


# ---- The benchmarks ------------------------------------------------------------------------------

def training_table(measured: dict) -> str:
    """Return the table of training speed: images/s of every loop (median and range), ratios, and parts of a step."""
    rows = [(f"{name}, images/s", f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})")
            for name, speeds in measured["images_per_second"].items()]
    rows += [(name, f"**{ratio:.2f}**") for name, ratio in measured["ratios"].items()]
    shares = {part: seconds for part, seconds in measured.get("step", {}).items() if part != "whole"}
    rows += [(f"share of a step: {part}", f"{100 * seconds / sum(shares.values()):.2f}%")
             for part, seconds in shares.items()]
    precision = f"ours in {measured['precision']}, plain in float32" if shares else measured["precision"]
    return table((f"batch {measured['batch_size']}; {precision}",
                  f"median of {len(next(iter(measured['images_per_second'].values())))} rounds (range)"), rows)


def depthwise_table(measured: dict) -> str:
    """Return the table of depthwise convolutions: milliseconds by stride."""
    rows = []
    for what, stride in (("14 with stride 1", 1), ("3 with stride 2", 2)):
        chosen = [row for row in measured["shapes"] if row["stride"] == stride]
        rows.append((what, *(f"{1000 * sum(row[name][part] for row in chosen):.1f}"
                             for name in ("bfloat16", "float32", "bfloat16 compiled")
                             for part in ("forward", "backward"))))
    return table(("depthwise convolutions", "bfloat16, forward", "backward", "float32, forward", "backward",
                  "compiled, bfloat16, forward", "backward"), rows)


def inference_table(measured: dict) -> str:
    """Return the table of inference speed by batch size, then that of each kind of layer alone (onnxruntime's profile).
    """
    rows = []
    for name, found in measured["speeds"].items():
        engine, batch = name.rsplit(", ", 1)
        rows.append((batch, engine, f"{statistics.median(found['images_per_second']):,.0f}",
                     f"{found['ratio_to_torch']:.2f}", f"{found['ratio_to_onnx_float']:.2f}"))
    batch = max(int(name.rsplit(", ", 1)[1]) for name in measured["parts"])
    floats, codes = (measured["parts"][f"{engine}, {batch}"] for engine in ("onnx float", "onnx 8-bit"))
    rows += [(batch, f"onnx 8-bit: {part} alone", f"{1e6 / codes[part]:,.0f}", "", f"{floats[part] / codes[part]:.2f}")
             for part in floats]
    return table(("batch", "engine", "images/s", "ratio to torch", "ratio to onnx float"), rows)


def methods_table(measured: dict) -> str:
    """Return the table of pruning methods by target: hold-out accuracy, the differences from pruning at once for each
    seed, and the share of the pruned layers' weights that were near zero before the mask."""
    rows, lines = measured["rows"], []
    values = by_seed(rows)
    dense = values.pop(0, {}).get("dense")
    for method in sorted({method for found in values.values() for method in found}, key=by_lambda):
        lines.append([method])
        for target, found in values.items():
            near = [row["near_zero"] for row in rows if (row["method"], row["target"]) == (method, target)]
            lines[-1] += [mean_of(found[method]), f"{statistics.mean(near):.1%}" if near else "",
                          differences(found[method], found.get("one-shot", {})) if method != "one-shot" else ""
                          ] if method in found else ["", "", ""]
    head = ["method", *(text for target in values for text in (
        f"**{target:.0%} zeros**: hold-out accuracy ± standard deviation (seeds)", "weights below 1e-4 before the mask",
        "points above one-shot, by seed"))]
    about = measured["about"]
    epochs = "{} epochs dense, {} to make zeros, {} under the mask".format(*about["epochs"])
    where = device(rows[0]["machine"])
    yardstick = f" Without pruning, the same training reaches {mean_of(dense)}." if dense else ""
    return table(head, lines) + (
        "\n\n`python -m benchmarks.sparsity_methods --json benchmarks/sparsity_methods.json`: `"
        f"{about['network']}`, {epochs}, with Muon in batches of {about['batch_size']}, images "
        f"`{about['sizes']}`, without teachers, {about['precision']} on {where}. `loss-L` is the penalty in the loss "
        "with λ = L, `plain` is `proximal` without reweighting; `one-shot` trains densely, and prunes all at once. "
        "More, and how they differ, in its `--help`."
        f"{yardstick}\n\n![hold-out accuracy of pruning methods](../figures/methods.png)")


BENCHMARKS = {"speed": ("training_speed.json", training_table),
              "speed_avx2": ("training_speed_avx2.json", training_table),
              "fine_tuning": ("fine_tuning_speed.json", training_table),
              "depthwise": ("depthwise_shapes.json", depthwise_table),
              "inference": ("inference_speed.json", inference_table),
              "methods": ("sparsity_methods.json", methods_table)}
