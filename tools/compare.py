"""Compare runs: what every stage reached, and mean and deviation over runs that differ in their seed alone.

    python -m tools.compare runs/a runs/b              a table of all stages, and of what was quantized from them
    python -m tools.compare runs/* --layers            the zeros of every layer, too
    python -m tools.compare runs/* --csv F --figure F  the table as CSV; loss, accuracy and zeros against the images

A run is a folder of training/main.py, or of a fine-tuning by quantize.py (OUT.run). A checkpoint in it, or next to
OUT.run, that has a claim is a row of its own, with its score (32-bit accumulators). Accuracies are those that were
measured during training: on the test set, or with --holdout on the held-out images.
"""
import argparse
import csv
import io
import json
import statistics
from pathlib import Path

from compressed import claims
from compressed.command_line import command_line, run_script, some_path
from compressed.errors import BadInput
from compressed.files import check_outputs, replacing, save_text
from compressed.networks import load_state
from training.runs import Stage, read_stages

COLUMNS = ("run", "stage", "network", "epochs", "seed", "images", "loss", "accuracy", "zeros", "score")
AVERAGED = ("loss", "accuracy", "zeros", "score")
FORMATS = {"images": "{:,}", "loss": "{:.4f}", "accuracy": "{:.2%}", "zeros": "{:.2%}", "score": "{:.5f}"}


def parse(argv=None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", type=some_path, metavar="RUN", help="run folders")
    parser.add_argument("--layers", action="store_true", help="also print the share of zeros of every layer")
    parser.add_argument("--csv", type=some_path, metavar="F", help="write the table as CSV, with all digits")
    parser.add_argument("--figure", type=some_path, metavar="F", help="draw the curves (.png, .pdf, .svg)")
    return parser.parse_args(argv)


# ---- Rows: {column: value}, and "key", which is equal for runs that differ in their seed alone -----------------------

def share_of_zeros(line: dict) -> float | None:
    """Return the share of zeros in an epoch's line of a log; None in a log of an older version."""
    return line["zeros"] / line["weights"] if "weights" in line else None


def stage_row(run: Path, stage: Stage) -> dict:
    last = stage.lines[-1]
    epochs = stage.settings["epochs"]
    tested = [line["test_accuracy"] for line in stage.lines if "test_accuracy" in line]
    return {"run": str(run), "stage": stage.name, "network": stage.options.get("network"),
            "epochs": epochs if last["epoch"] == epochs else f"{last['epoch']} of {epochs}",
            "seed": stage.settings.get("seed"), "images": stage.images, "loss": last["loss"],
            "accuracy": tested[-1] if tested else None, "zeros": share_of_zeros(last)}


def claim_paths(run: Path) -> list[Path]:
    """Return the paths of the claims of the checkpoints in a run folder, or of the one next to OUT.run."""
    checkpoints = [*sorted(run.glob("*.pt")), *([run.with_suffix(".pt")] if run.suffix == ".run" else [])]
    return [claims.claim_path(path) for path in checkpoints if path.is_file() and claims.claim_path(path).is_file()]


def claim_row(run: Path, path: Path, claim: dict) -> dict:
    """Return the row of a checkpoint that quantize.py wrote. Raises BadInput for a claim that is not whole."""
    try:
        accuracy, counts = claim["accuracy"], claim["counts"]
        return {"run": str(run), "stage": claim["checkpoint"], "network": claim.get("network", {}).get("spec"),
                "accuracy": accuracy["correct"] / accuracy["images"], "loss": None,
                "zeros": counts["weights"]["all"]["sparsity"], "score": counts["score"]["32-bit"]["score"]}
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a claim with accuracy and counts; write it again with quantize.py") from error


def rows_of(run: Path, stages: list[Stage]) -> list[dict]:
    """Return the rows of a run: its stages, then the checkpoints that were quantized from it."""
    rows, key = [], []
    for stage in stages:  # the stages before decide the result, too
        key.append([stage.name, stage.apart_from_seed()])
        rows.append(stage_row(run, stage) | {"key": json.dumps(key, sort_keys=True)})
    for path in claim_paths(run):
        claim = claims.read(path)
        bits = [entry.get("bits") for entry in claim.get("tensors", [])]
        rows.append(claim_row(run, path, claim) | {"seed": stages[-1].settings.get("seed") if stages else None,
                                                   "key": json.dumps([key, path.name, bits], sort_keys=True)})
    return rows


def over_seeds(rows: list[dict]) -> list[dict]:
    """Return a row for each group of runs that differ in their seed alone: {column: (mean, deviation)}.

    The deviation is the sample's (n - 1). A column that some run of the group lacks is None.
    """
    groups = {}
    for row in rows:
        groups.setdefault(row["key"], []).append(row)
    averaged = []
    for group in groups.values():
        if len({row["seed"] for row in group}) < 2:
            continue
        first = {"stage": group[0]["stage"], "network": group[0]["network"], "runs": len(group)}
        for column in AVERAGED:
            values = [row.get(column) for row in group]
            known = None not in values
            first[column] = (statistics.mean(values), statistics.stdev(values)) if known else None
        averaged.append(first)
    return averaged


# ---- Output ----------------------------------------------------------------------------------------------------------

def shown(column: str, value) -> str:
    """Return a value, or a pair of mean and deviation, as text in its column's format."""
    if value is None:
        return "-"
    form = FORMATS.get(column, "{}")
    return " +- ".join(map(form.format, value)) if isinstance(value, tuple) else form.format(value)


def table(columns, rows: list[dict]) -> str:
    """Return rows as lines of text, in columns as wide as they must be."""
    lines = [columns, *([shown(column, row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def layer_zeros(run: Path, stages: list[Stage]) -> dict[str, float]:
    """Return {layer: share of zeros} of the weights with which a run's last stage ended, or was stopped; {} if none."""
    for stage in reversed(stages):
        for path in (run / f"{stage.name}.pt", run / f"{stage.name}.average.pt"):
            if path.is_file():
                return {name.removesuffix(".weight"): float((value == 0).double().mean())
                        for name, value in load_state(path).items() if name.endswith(".weight") and value.dim() > 1}
    return {}


def layer_table(runs: dict[Path, list[Stage]]) -> str:
    """Return a table with a row for every layer, and a column for every run."""
    zeros = {str(run): layer_zeros(run, stages) for run, stages in runs.items()}
    names = list(dict.fromkeys(name for each in zeros.values() for name in each))
    return table(("layer", *zeros), [{"layer": name} | {run: f"{each[name]:.2%}" if name in each else None
                                                        for run, each in zeros.items()} for name in names])


def curves(stages: list[Stage]) -> dict[str, list[tuple[float, float]]]:
    """Return the points (millions of images since the run's beginning, value) of loss, accuracy and zeros (%).

    path: the share of zeros that a target wants.
    """
    points, before = {"loss": [], "accuracy": [], "zeros": [], "path": []}, 0
    for stage in stages:
        for line in stage.lines:
            at = (before + stage.images_at(line)) / 1e6
            points["loss"].append((at, line["loss"]))
            if "test_accuracy" in line:
                points["accuracy"].append((at, 100 * line["test_accuracy"]))
            if (share := share_of_zeros(line)) is not None:
                points["zeros"].append((at, 100 * share))
            if "zeros_path" in line:
                points["path"].append((at, 100 * line["zeros_path"]))
        before += stage.images
    return points


def figure(runs: dict[Path, list[Stage]]):
    """Return a matplotlib figure: loss, accuracy and zeros of every run against the images that it was trained on."""
    from tools.figures import plt  # here: the tables need no matplotlib
    drawn, panels = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    titles = {"loss": "training loss", "accuracy": "accuracy where measured (%)", "zeros": "zeros (%); dashed: wanted"}
    for (name, title), axes in zip(titles.items(), panels):
        for run, stages in runs.items():
            found = curves(stages)
            line, = axes.plot(*zip(*found[name]) if found[name] else ([], []), ".-", ms=4, lw=1, label=str(run))
            if name == "zeros" and found["path"]:
                axes.plot(*zip(*found["path"]), "--", lw=1, color=line.get_color())
        axes.set(title=title, xlabel="images, all stages (millions)")
        axes.grid(color="#dddddd")
    panels[0].legend(frameon=False, fontsize=8)
    return drawn


def save_figure(drawn, path: Path) -> None:
    """Write a figure in the format of the path's suffix. Raises BadInput for one that matplotlib does not know."""
    known = drawn.canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise BadInput(f"{path}: expected a name that ends in .{', .'.join(sorted(known))}")
    with replacing(path) as file:
        drawn.savefig(file, format=path.suffix[1:])


def main(argv=None) -> int:
    args = parse(argv)
    check_outputs([path for path in (args.csv, args.figure) if path])
    runs = {run: read_stages(run) for run in dict.fromkeys(args.runs)}
    rows = []
    for run, stages in runs.items():
        rows += (found := rows_of(run, stages))
        if not found:
            raise BadInput(f"{run}: there is no run, whose logs training/main.py or quantize.py --epochs writes")
    print(table(COLUMNS, rows))
    if averaged := over_seeds(rows):
        print("\nover seeds: mean +- deviation\n" + table(("stage", "network", "runs", *AVERAGED), averaged))
    if args.layers:
        print("\nzeros of the layers, with the weights of the last stage\n" + layer_table(runs))
    if args.csv:
        save_text(as_csv(rows), args.csv)
    if args.figure:
        save_figure(figure(runs), args.figure)
    return 0


if __name__ == "__main__":
    run_script(main)
