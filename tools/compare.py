"""Compare runs: what every stage reached, and mean and deviation over runs that differ in their seed alone.

    python -m tools.compare runs/a runs/b              a table of all stages, and of what was quantized from them
    python -m tools.compare runs/* --layers            the zeros of every layer, too
    python -m tools.compare runs/* --csv F --figure F  the table as CSV; loss, accuracy and zeros against the images

A run is a folder of training/main.py, or of a fine-tuning by quantize.py (OUT.run). A checkpoint with a claim, in it or
next to OUT.run, gets a row of its own, with its score (32-bit accumulators). Accuracies are those that were
measured during training: on the test set, or with --holdout on the held-out images.
"""
import argparse
import csv
import dataclasses
import io
import itertools
import json
import statistics
from pathlib import Path

from compressed import claims
from compressed.command_line import command_line, needed, run_script, some_path
from compressed.errors import BadInput, refused
from compressed.files import check_outputs, replacing, save_text
from compressed.networks import load_state
from training import sparsity
from training.runs import StageRecord, read_stages, stage_of
from training.state import State

# {column: its format}
COLUMNS = {**dict.fromkeys(("run", "stage", "network", "epochs", "seed"), "{}"), "images": "{:,}", "loss": "{:.4f}",
           "accuracy": "{:.2%}", "on": "{}", "zeros": "{:.2%}", "score": "{:.5f}"}
AVERAGED = ("loss", "accuracy", "zeros", "score")


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
    return line["zeros"] / max(1, line["weights"]) if "weights" in line else None


def apart_from_seed(stage: StageRecord) -> dict:
    """Return what decides a stage's result but for its seed; also what older records leave open of the penalty."""
    resolved = sparsity.resolved(stage.options) if stage.name == "rew" else stage.options
    return dataclasses.replace(stage, options=resolved).apart_from_seed()


def stages_up_to(path: Path) -> dict[str, StageRecord]:
    """Return {name: stage} of the stages in the folder of a stage's file, up to that stage; {} if it is of no stage."""
    found = {each.name: each for each in read_stages(path.parent)} if path.parent.is_dir() else {}
    names = list(found)
    return {name: found[name] for name in names[:names.index(stage_of(path)) + 1]} if stage_of(path) in found else {}


def described(stage: StageRecord) -> list:
    """Return [name, what decides a stage's result but for its seed].

    A teacher that is a stage of another run is described by the stages of that run: for each seed it may be another.
    """
    what = apart_from_seed(stage)
    if teachers := what.get("teacher"):
        what["teacher"] = [[[name, apart_from_seed(each)] for name, each in stages_up_to(Path(path)).items()] or path
                           for path in teachers]
    return [stage.name, what]


def with_start(stage: StageRecord) -> tuple[list[list], list]:
    """Return (what decides a stage's result but for the seeds, the seeds): of the stages up to its --start, and of it.

    Those are the stages in the folder of the file that it starts from. If they are not known, it is the file's path.
    """
    found, seeds = [], []
    if stage.options.get("start"):
        path, epoch = Path(stage.options["start"]), stage.options.get("start_epoch") or 0
        for each in (stages := stages_up_to(path)).values():
            own = Path(each.options.get("start") or "").parent == path.parent  # a copy in the folder of its stage
            key, before = ([described(each)], [each.settings.get("seed")]) if own else with_start(each)
            found, seeds = found + key, seeds + before
        found.append([path.suffix if stages else str(path), epoch])
    return [*found, described(stage)], [*seeds, stage.settings.get("seed")]


def measured_on(options: dict) -> str:
    """Return the kind of images on which a stage with these options was tested."""
    return "hold-out" if options.get("holdout") else "made up" if options.get("made_up") else "test"


def row_of_claim(run: Path, path: Path, claim: dict) -> dict:
    """Return the row of a checkpoint with a claim. All that the claim records of its making decides its result."""
    made, key, seeds = claim.get("made_by", {}), [], []
    for stage in map(StageRecord.of_claim, made.get("training", [])):
        more, its = with_start(stage)
        key, seeds = key + more, seeds + its
    if not any(name != "quantized" for name, *_ in key):  # trained elsewhere
        key.append(made.get("source_sha256"))
    options = made.get("command")  # of an older version
    if "options" in made:
        options = {name: value for name, value in made["options"].items() if name != "seed"}
    bits = [entry.get("bits") for part in ("tensors", "activations") for entry in claim.get(part, [])]
    accuracy, counts = claim["accuracy"], claim["counts"]
    network = claim.get("network", {}).get("spec")
    key = [key, network, options, bits, claim.get("data_set", {}).get("digest"), accuracy["data"]]
    return {"run": run, "stage": path.name, "network": network,
            "seed": seeds[-1] if seeds else None, "seeds": [*seeds, made.get("options", {}).get("seed")],
            "accuracy": accuracy["correct"] / accuracy["images"], "on": accuracy["data"],
            "zeros": counts["weights"]["all"]["sparsity"], "score": counts["score"]["32-bit"]["score"],
            "key": json.dumps(key, sort_keys=True)}


def rows_of(run: Path, stages: list[StageRecord]) -> list[dict]:
    """Return the rows of a run: its stages, then the checkpoints that were quantized from it.

    Raises BadInput for a claim without accuracy or counts.
    """
    rows, key, seeds = [], [], []
    for stage in stages:
        more, its = with_start(stage)
        key, seeds = key + more, seeds + its  # the stages before decide the result, too
        last, epochs = stage.lines[-1], stage.settings["epochs"]
        tested = [line["test_accuracy"] for line in stage.lines if "test_accuracy" in line]
        rows.append({"run": run, "stage": stage.name, "network": stage.options.get("network"),
                     "epochs": epochs if last["epoch"] == epochs else f"{last['epoch']} of {epochs}", "seed": seeds[-1],
                     "seeds": seeds, "images": stage.images(last), "loss": last["loss"],
                     "accuracy": tested[-1] if tested else None, "on": measured_on(stage.options) if tested else None,
                     "zeros": share_of_zeros(last), "key": json.dumps([key, last["epoch"]], sort_keys=True)})
    next_to_it = [run.with_suffix(".pt")] if run.suffix == ".run" else []  # of a fine-tuning, whatever it is called
    for path in (*sorted(run.glob("*.pt")), *next_to_it):
        file = claims.claim_path(path)
        if path.is_file() and file.is_file():
            claim = claims.read(file)
            with refused(f"{file}: not a claim with accuracy and counts", "; write it again with quantize.py"):
                rows.append(row_of_claim(run, path, claim))
    return rows


def over_seeds(rows: list[dict]) -> list[dict]:
    """Return a row for each group of runs that differ in their seeds alone: {column: (mean, deviation)}.

    The deviation is the sample's (n - 1). A column that some run of the group lacks is None. Of several runs of the
    same seeds, which are repetitions, the last counts.
    """
    groups, averaged = {}, []
    for row in rows:
        groups.setdefault(row["key"], {})[tuple(row["seeds"])] = row
    for group in map(list, map(dict.values, groups.values())):
        if len(group) > 1:
            averaged.append({"stage": group[0]["stage"], "network": group[0]["network"], "runs": len(group)})
            for column in AVERAGED:
                values = [row.get(column) for row in group]
                averaged[-1][column] = None if None in values else (statistics.mean(values), statistics.stdev(values))
    return averaged


# ---- Output ----------------------------------------------------------------------------------------------------------

def shown(column: str, value) -> str:
    """Return a value, or a pair of mean and deviation, as text in its column's format."""
    values = value if isinstance(value, tuple) else (value,)
    return "-" if value is None else " +- ".join(map(COLUMNS.get(column, "{}").format, values))


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


def last_weights(run: Path, stage: str) -> dict:
    """Return the state dict with which a stage ended or was stopped, else its average of then; {} if there is none."""
    ended, state, average = run / f"{stage}.pt", State(run / f"{stage}.state"), run / f"{stage}.average.pt"
    if state.exists and not ended.is_file():
        return state.read("weights")
    return next((load_state(path) for path in (ended, average) if path.is_file()), {})


def layer_table(runs: dict[Path, list[StageRecord]]) -> str:
    """Return a table of the share of zeros: a row for every layer, and a column for every run.

    The weights are those with which a run's last stage ended, or was stopped.
    """
    rows = {}
    for run, stages in runs.items():
        for name, value in last_weights(run, stages[-1].name).items() if stages else ():
            if name.endswith(".weight") and value.dim() > 1:
                layer = name.removesuffix(".weight")
                rows.setdefault(layer, {"layer": layer})[str(run)] = f"{(value == 0).double().mean():.2%}"
    return table(("layer", *map(str, runs)), list(rows.values()))


def curves(stages: list[StageRecord]) -> dict[str, list[tuple[float, float]]]:
    """Return the points (millions of images since the run's beginning, value) of loss, accuracy and zeros.

    path: the share of zeros that a target wants.
    """
    points, before = {"loss": [], "accuracy": [], "zeros": [], "path": []}, 0
    for stage in stages:
        for line in stage.lines:
            zeros = line.get("zeros_share", share_of_zeros(line))  # of the pruned layers, as the path is
            values = line["loss"], line.get("test_accuracy"), zeros, line.get("zeros_path")
            for curve, value in zip(points.values(), values):
                if value is not None:
                    curve.append(((before + stage.images(line)) / 1e6, value))
        before += stage.images(stage.lines[-1])
    return points


def save_figure(runs: dict[Path, list[StageRecord]], path: Path) -> None:
    """Draw loss, accuracy and zeros of every run against the images that it was trained on, in the path's format."""
    drawn, panels = needed("tools.figures").plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    titles = {"loss": "training loss", "accuracy": "accuracy where measured",
              "zeros": "zeros (while they are made, of the\npruned layers; dashed: wanted)"}
    for (name, title), axes in zip(titles.items(), panels):
        for run, stages in runs.items():
            found = curves(stages)
            line, = axes.plot(*zip(*found[name]) if found[name] else ([], []), ".-", ms=4, lw=1, label=str(run))
            if name == "zeros" and found["path"]:
                axes.plot(*zip(*found["path"]), "--", lw=1, color=line.get_color())
        axes.set(title=title, xlabel="images, all stages (millions)")
        axes.grid(color="#dddddd")
        axes.locator_params(axis="x", nbins=6)
    for axes in panels[1:]:
        axes.yaxis.set_major_formatter("{x:.0%}")
    panels[0].legend(frameon=False, fontsize=8)
    try:
        with replacing(path) as file:
            drawn.savefig(file, format=path.suffix[1:])
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error


def main(argv=None) -> int:
    args = parse(argv)
    if args.figure:
        needed("tools.figures")  # before any work: matplotlib may be missing
    read = [path for run in args.runs for kind in ("*.jsonl", "*.json", "*.pt", "*.state/*") for path in run.glob(kind)]
    check_outputs([path for path in (args.csv, args.figure) if path], read)
    runs = {run: read_stages(run) for run in dict.fromkeys(args.runs)}
    found = {run: rows_of(run, stages) for run, stages in runs.items()}
    for run, rows in found.items():
        if not rows:
            raise BadInput(f"{run}: there is no run here: no log of training/main.py or of quantize.py --epochs, and "
                           "no checkpoint with a claim")
    rows = list(itertools.chain(*found.values()))
    print(table(COLUMNS, rows))
    if averaged := over_seeds(rows):
        print("\nover seeds: mean +- deviation\n" + table(("stage", "network", "runs", *AVERAGED), averaged))
    if args.layers:
        print("\nzeros of the layers, with the weights of the last stage\n" + layer_table(runs))
    if args.csv:
        save_text(as_csv(rows), args.csv)
    if args.figure:
        save_figure(runs, args.figure)
    return 0


if __name__ == "__main__":
    run_script(main)
