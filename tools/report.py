"""Write the tables and figures of the pages, from the shipped checkpoints, their claims and the training logs.

    python -m tools.report            writes figures/*.png (see tools/figures.py), and the tables in PAGES between
                                      <!-- NAME --> and <!-- end NAME -->
    python -m tools.report --check    writes nothing; exit status 2 if a table in the pages is out of date
"""
import dataclasses
import functools
import re
from collections import Counter
from pathlib import Path

from torch import nn

from compressed import checkpoints, claims, counting, networks
from compressed.command_line import command_line, needed, run_script, some_path
from compressed.counting import CONVENTIONS
from compressed.errors import BadInput
from compressed.files import load_json, replacing, save_text
from compressed.formats import listed
from compressed.graph import trace, weight_layers
from tools import shipping
from tools.tables import BENCHMARKS, by_seed, device, table
from training.runs import StageRecord, load_lines, read_record, read_stage, stage_logs

KINDS = {"conv": "convolutions", "batchnorm": "BatchNorm (requantization)", "relu": "ReLU", "add": "residual additions",
         "mean": "average pooling", "linear": "linear layer"}
STORED = {"weights": "weights that are stored", "masks": "masks, one bit for each position",
          "batchnorm": "BatchNorm scales and shifts", "biases": "biases of the linear layer",
          "steps": "steps of all grids, at 32 bits", "total": "total"}
ROOT = shipping.ROOT
PAGES = ("README.md", "ACCOUNT.md", "benchmarks/README.md", "record/README.md", "training/METHOD.md")
# the challenge's published entries for CIFAR-100: name and rank (a team may have several entries), network, accuracy
# (the first belongs to the score), and the scores under the three accumulator conventions
BOARD = (
    ("RIAIR, 1st", "DenseNet-100 k=12, 75% sparse, 4-bit weights and activations (verified: 0.0044)",
     "80.17 in float16, 80.39 in float32", "0.008544", "0.005234 to 0.005440", "0.004169 to 0.004375"),
    ("KAIST AI ver1, 2nd", "450,456 weights, 60% sparse, 16-bit", "80.07", "0.0054454", "-", "-"),
    ("KAIST AI ver2, 3rd", "471,184 weights, 60% sparse, 16-bit", "80.04", "0.0056215", "-", "-"),
    ("OSI AI, 4th", "470,776 weights, 64% sparse, early exit, 16-bit", "80.04", "0.0058", "-", "-"),
    ("MSUNet-v3, 5th", "ternary", "80.13", "0.0108", "-", "-"),
    ("Woody", "related to the submission, 8/6 bits", "80.06", "-", "-",
     "0.0155 by its own count, 0.0188 verified"))
# shipped networks that are not ours, by their specification: (their name everywhere, what the pages say of them)
OTHERS = {"mobilenet_v2:KaistMobileNetV2": (
    "KAIST AI's network, compressed further",
    "layers, masks and most of the training are KAIST AI's ([MIT licence](LICENSE), Copyright (c) 2019 Kthyeon), whose "
    "authors chose the epoch by test accuracy.")}


# ---- What is known -------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Shipped:
    """Hold a shipped network: its folder ("" for the root), its model and its claim.

    The last two fields are set only for the network at the root. others: the networks in folders of their own. dense:
    the result of testers.py --json for record/dense.pt, or None if there is none, and two more keys: "freed", whether
    it is the shipped network trained further without its mask, and "images_trained", the images of its last stage.
    """
    folder: str
    model: nn.Module
    claim: dict
    others: tuple["Shipped", ...] = ()
    dense: dict | None = None

    @property
    def spec(self) -> str:
        return self.claim.get("network", {}).get("spec", networks.DEFAULT)

    @property
    def name(self) -> str:
        if self.spec in OTHERS:
            return OTHERS[self.spec][0]
        return f"ours, {self.folder}/" if self.folder else "ours"

    @property
    def accuracy(self) -> float:
        """The test accuracy in %."""
        return 100 * self.claim["accuracy"]["correct"] / self.claim["accuracy"]["images"]

    @property
    def scores(self) -> dict[str, float]:
        return {c: self.claim["counts"]["score"][c]["score"] for c in CONVENTIONS}

    @functools.cached_property
    def counted(self) -> dict[str, list[counting.Row]]:
        """The rows of all operations, by accumulator convention."""
        formats, operations = claims.stated_formats(self.model, self.claim), trace(self.model)
        return {c: counting.count(operations, formats, c) for c in CONVENTIONS}

    def dense_row(self) -> tuple[str, ...]:
        if self.dense is None:
            return "dense; ours: not trained yet", "-", "81.92%", "`bash run.sh baseline runs/dense`"
        label = "dense; ours: the masked network, trained further without its mask" if self.dense["freed"] else "dense"
        return label, self.percent(self.dense["correct"]), "81.92%", "`python testers.py --checkpoint record/dense.pt`"

    def unseen_rows(self) -> list[tuple[str, ...]]:
        """Return a row with the accuracy on images without near-duplicates, where testers.py could measure it."""
        part = self.claim["accuracy"].get("without_duplicates")  # it needs the order of the published test file
        return [] if part is None else [
            ("the same, of test images without a near-duplicate in the train set",
             f"{part['correct'] / part['images']:.2%} ({part['correct']:,} of {part['images']:,})", "-", TEST)]

    def result(self) -> str:
        accuracy = self.claim["accuracy"]
        return f"**{self.accuracy:.2f}%** ({accuracy['correct']:,} of {accuracy['images']:,})"

    def score_text(self) -> str:
        return ", ".join(f"{score:.4f}" for score in self.scores.values())

    def weight_bits(self) -> list[int]:
        """Return the bits of all layers' weights."""
        layers = {f"{name}.weight" for name, _ in weight_layers(self.model)}
        return [entry["bits"] for entry in self.claim["tensors"] if entry["name"] in layers]

    def description(self) -> str:
        width = networks.width(self.spec)  # None for another network than the submission's
        name = self.spec.partition(":")[2] if width is None else f"MobileNetV2 x{width:g}"
        weights = self.claim["counts"]["weights"]["all"]
        activations = listed(entry["bits"] for entry in self.claim["activations"])
        return (f"{name}, {weights['total']:,} weights, {weights['sparsity']:.0%} sparse, "
                f"{listed(self.weight_bits())}-bit weights, {activations}-bit activations")

    @property
    def stages(self) -> dict[str, dict]:
        return {stage["stage"]: stage for stage in self.claim["made_by"]["training"]}

    def percent(self, correct: int) -> str:
        return f"{100 * correct / self.claim['accuracy']['images']:.2f}%"

    def images_by_device(self) -> Counter:
        """Return the images on which all stages were trained by their logs, for each kind of device."""
        images = Counter()
        for stage in self.stages.values():
            record = StageRecord.of_claim(stage)
            images[device(machine(record.machine))] += record.images(record.lines[-1])
        return images

    def effort(self) -> str:
        """Return the images and the time of all stages by their logs, summed for each kind of device."""
        seconds, images = Counter(), self.images_by_device()
        for stage in self.stages.values():
            seconds[device(machine(stage["machine"]))] += stage["last_epoch"]["seconds"]
        parts = [f"{images[where] / 1e6:.2f}M in " + (f"{x / 3600:.1f} h" if x > 3600 else f"{x / 60:.0f} min")
                 + f" on {where}" for where, x in seconds.items()]
        return f"{sum(images.values()) / 1e6:.2f}M: " * (len(parts) > 1) + ", ".join(parts)

    def notes(self) -> str:
        """Return a paragraph for each network that is not ours, to go below a table that shows it."""
        return "".join(f"\n\n*{each.name}* ([{each.folder}/]({each.folder})): {OTHERS[each.spec][1]}"
                       for each in (self, *self.others) if each.spec in OTHERS)


def machine(recorded: dict | str) -> dict:
    """Return the machine of a stage's record as a dict: "device", "cores", "processes", "torch".

    Older records have a text, "1 process(es), CPU, 2 core(s), torch 2.14.1, Python 3.11.7" or a part of it.
    """
    if isinstance(recorded, dict):
        return recorded
    numbers = {unit: int(number) for number, unit in re.findall(r"(\d+) (core|process)", recorded)}
    name, = (part for part in recorded.split(", ") if not re.search("core|process|torch|Python", part))
    return {"device": name, "cores": numbers.get("core", 1), "processes": numbers.get("process", 1),
            "torch": re.search(r"torch ([^,]+)", recorded)[1]}


# ---- Tables: of the shipped network --------------------------------------------------------------

LOG = "[record](record/README.md)"
TEST, CHECK = "`python testers.py`", "`python check_model_operations.py`"
HEAD = ("", "this repository", "the submission", "command")  # what the submission reported is from its README


def summary(m: Shipped) -> str:
    counts = m.claim["counts"]
    zeros = [f"{100 * counts['weights'][key]['sparsity']:.2f}%" for key in ("submission", "all")]
    return table(HEAD, [
        ("**accuracy, shipped: masked and quantized**", m.result(), "80.12%", TEST),
        *m.unseen_rows(),
        m.dense_row(),
        ("images trained; time", m.effort(), "30M after dense training", LOG),
        ("zeros, by the submission's convention (exact)", f"{zeros[0]} ({zeros[1]})", "76.95%", TEST),
        ("parameter storage; operations (32-bit units)", f"{counts['storage']['total'] / 32e6:.4f}M; "
         f"{counts['operations']['32-bit']['bits'] / 32e6:.2f}M", "not given", CHECK),
        ("score: 32-bit, fixed-length, tree accumulators", m.score_text(), "not given", CHECK),
        *((f"**{other.name}**: accuracy; score", f"{other.result()}; {other.score_text()}", "-", "`bash run.sh`")
          for other in m.others)]) + m.notes()


def results(m: Shipped) -> str:
    counts, by = m.claim["counts"], "by the submission's convention"
    difference = [] if m.dense is None else [
        ("difference from this dense network",
         f"{100 * m.dense['correct'] / m.dense['images'] - m.accuracy:.2f} points", "-", "these commands")]
    exact, theirs, bits = counts["weights"]["all"], counts["weights"]["submission"], m.weight_bits()
    operations = counting.submission_operations(trace(m.model))
    by_penalty = m.stages["rew"]["last_epoch"]["zeros"] if "rew" in m.stages else 0
    return table(HEAD, [
        m.dense_row(),
        ("masked, not quantized", m.percent(m.claim["accuracy_by_step"][0]["correct"]), "-",
         "`python testers.py --checkpoint record/masked.pt`"),
        ("**shipped: masked and quantized**", m.result(), "80.12%", TEST), *m.unseen_rows(),
        *difference,
        ("weights, convolutions and linear, exact", f"{exact['total']:,}", "-", TEST),
        ("zeros, exact", f"{exact['zeros']:,} ({100 * exact['sparsity']:.2f}%)", "-", TEST),
        ("of these, made by the penalty (the others by mask, rounding and dead weight)",
         f"{by_penalty:,} ({by_penalty / exact['zeros']:.0%})", "-", "`record/rew.jsonl`"),
        (f"weights, {by}", f"{theirs['total']:,}", "3,905,632", TEST),
        (f"zeros, {by}", f"{theirs['zeros']:,}", "3,005,523", TEST),
        (f"non-zeros, {by}", f"{theirs['nonzeros']:,}", "900,109", TEST),
        (f"sparsity, {by}", f"{theirs['sparsity']:.4f}", "0.7695", TEST),
        (f"compression rate, {by}", f"{theirs['compression']:.4f}", "4.3391", TEST),
        ("bits of weights", ", ".join(f"{width} in {count}" + " layers" * (i == 0) for i, (width, count) in
                                      enumerate(sorted(Counter(bits).items()))), "6 in 9 layers, 8 in 49", TEST),
        ("parameter storage (32-bit parameters)", f"{counts['storage']['total'] / 32e6:.4f}M", "not given", TEST),
        (f"operations, {by}", f"{operations['bits'] / 32e6:.2f}M", "231.25M", CHECK),
        ("operations of all kinds, on non-zero weights", f"{counts['operations']['32-bit']['bits'] / 32e6:.2f}M", "-",
         CHECK)])


def dense(m: Shipped) -> str:
    """Return a sentence on what the dense network is."""
    if m.dense is None or m.dense["freed"]:
        what = "There is no dense network here" if m.dense is None else "The dense network here is no training"
        return f"{what} from scratch ([record](record/README.md)), so what compression costs is not known."
    images = [f"{count / 1e6:.2f}M" for count in (m.dense["images_trained"], sum(m.images_by_device().values()))]
    return (f"The dense network was trained from scratch on {images[0]} images, the shipped one on {images[1]} "
            "([record](record/README.md)).")


def steps(m: Shipped) -> str:
    rows, by_step = [], m.claim["accuracy_by_step"]
    for step, before in zip(by_step, [None, *by_step]):
        change = f"{100 * (step['correct'] - before['correct']) / m.claim['accuracy']['images']:+.2f}" if before else ""
        rows.append((step["step"], f"{step['correct']:,}", m.percent(step["correct"]), change))
    return table(("step of `quantize.py`", "correct", "accuracy", "change"), rows)


def stages(m: Shipped) -> str:
    rows = []
    for name, stage in m.stages.items():
        last, settings, where = stage["last_epoch"], stage["settings"], machine(stage["machine"])
        planned = settings["epochs"]
        epochs = planned if last["epoch"] == planned else f"{last['epoch']} of {planned}"
        rows.append((name, epochs, settings["batch_size"], settings["optimizer"], settings["lr"],
                     settings["turn"] if settings["optimizer"] == "muon" else "-", settings["sizes"],
                     f"{last['zeros']:,}", f"{last['test_accuracy']:.2%}" if "test_accuracy" in last else "-",
                     f"{last['seconds'] / 60:.0f} min", f"{device(where)}, torch {where['torch']}"))
    return table(("stage", "epochs", "batch", "optimizer", "peak lr", "turn", "image sizes", "zeros", "test accuracy",
                  "time", "machine"), rows)


def score(m: Shipped) -> str:
    rows = []
    for c in CONVENTIONS:
        cost, scored = m.claim["counts"]["operations"][c], m.claim["counts"]["score"][c]
        rows.append((c, *(f"{cost[key] / 32e6:.3f}M" for key in ("multiplication_bits", "addition_bits", "bits")),
                     *(f"{scored[key]:.5f}" for key in ("storage", "operations", "score"))))
    return table(("accumulators", "multiplications", "additions", "operations", "storage / 36.5M",
                  "operations / 10.49B", "score"), rows)


def storage(m: Shipped) -> str:
    counted, file = m.claim["counts"]["storage"], m.claim["packed"]
    difference = 100 * (8 * file["bytes"] / counted["total"] - 1)
    sizes = {STORED[kind]: bits for kind, bits in counted.items()} | {
        f"the packed file `{file['file']}` ({difference:+.3f}% against the total)": 8 * file["bytes"]}
    return table(("storage", "bits", "32-bit parameters", "kB"), [
        (what, f"{bits:,}", f"{bits / 32e6:.4f}M", f"{bits / 8e3:,.1f}") for what, bits in sizes.items()])


def account(m: Shipped) -> str:
    rows, counted = [], m.counted
    for kind in [*dict.fromkeys(row.kind for row in counted["32-bit"]), "all"]:
        chosen = {c: [row for row in found if kind in (row.kind, "all")] for c, found in counted.items()}
        sums = {c: counting.totals(found) for c, found in chosen.items()}
        rows.append((KINDS.get(kind, kind), len(chosen["32-bit"]), f"{sums['32-bit']['multiplications']:,}",
                     f"{sums['32-bit']['additions']:,}", *(f"{each['bits'] / 32e6:.3f}" for each in sums.values())))
    return table(("operation", "how many", "multiplications", "additions", "32-bit", "fixed", "tree"), rows)


def dead(m: Shipped) -> str:
    removed = m.claim["dead_weight_removed"]
    share = removed["weights"] / (removed["weights"] + m.claim["counts"]["weights"]["all"]["nonzeros"])
    return table(("dead", "values set to zero", "saved"), [
        ("weights", f"{removed['weights']:,}", f"{share:.2%} of the non-zero weights, and the operations on them"),
        ("BatchNorm scales and shifts", f"{removed['scales and shifts']:,}",
         "nothing: these tensors are stored dense")])


def executed(m: Shipped) -> str:
    rows = []
    for engine, found, identical, command in (
            ("integers", m.claim["integer"], "identical", "`python -m tools.integer --record`"),
            ("onnxruntime, 8-bit", m.claim["onnx"], "same_logits", "`python -m tools.export_onnx --record`")):
        rows.append((engine, *(f"{found[key]:,}" for key in ("images", "correct", "agree", identical)), command))
    return table(("executed by", "images", "correct", "same prediction as `testers.py`",
                  "same logits to the last bit", "command"), rows)


def accumulators(m: Shipped) -> str:
    """Return the table of the five layers with the widest accumulator bounds; the claim has all layers."""
    widest = sorted(m.claim["integer"]["accumulators"], key=lambda row: row["bound"][0] - row["bound"][1])[:5]
    return table(("layer", "bound: lowest", "highest", "bits", "occurred: lowest", "highest", "bits",
                  "bits of the aligned sum"), [
        (row["layer"], *(f"{x:,}" for x in row["bound"]), row["bits"], *(f"{x:,}" for x in row["seen"]),
         row["seen_bits"], row["value_bits"]) for row in widest])


def board(m: Shipped) -> str:
    """Return the table of what is shipped here, with the scores of the claims, and the challenge's entries."""
    made = [(f"**{each.name}**, not entered", each.description(), f"**{each.accuracy:.2f}**",
             *(f"**{value:.4f}**" for value in each.scores.values()))
            for each in sorted((m, *m.others), key=lambda each: each.scores["32-bit"])]
    return table(("entry", "network", "accuracy", "32-bit additions", "fixed-length accumulators", "adder tree"),
                 [*made, *BOARD]) + m.notes()


TABLES = (summary, results, dense, steps, stages, score, storage, account, dead, executed, accumulators, board)
LATER = {"packed", "integer", "onnx"}  # what other tools add to the claim after quantize.py


# ---- Pages and figures ---------------------------------------------------------------------------

def tables(shipped: Shipped) -> dict[str, str]:
    """Return {NAME: table}."""
    return {make.__name__: make(shipped) for make in TABLES} | {
        name: make(load_json(ROOT / "benchmarks" / file)) for name, (file, make) in BENCHMARKS.items()}


def fill(page: str, contents: dict[str, str]) -> str:
    """Return the page with the text between <!-- NAME --> and <!-- end NAME --> replaced, for every NAME in it."""
    def filled(place: re.Match) -> str:
        if place[2] not in contents:
            raise BadInput(f"a page has a place for a table {place[2]!r}: there is none of that name")
        return f"{place[1]}{contents[place[2]]}\n{place[3]}"
    return re.sub(r"(<!-- (\w+) -->\n).*?(<!-- end \2 -->)", filled, page, flags=re.S)


def feedback_stages(logs: Path) -> dict[str, list[dict]]:
    """Return {network and target: the log's lines} of the reweighted stages that followed a sparsity path.

    They are that of the folder `logs`, and those of the runs that the repository holds in other folders.
    """
    found = {}
    for log in (logs / "rew.jsonl", *sorted(ROOT.glob("record/*/rew.jsonl")), *sorted(ROOT.glob("*/record/rew.jsonl"))):
        lines = load_lines(log) if log.is_file() else []
        if lines and "zeros_path" in lines[-1]:
            spec = read_record(log.with_suffix(".options.json"))["options"]["network"]
            found.setdefault(f"{spec.partition(':')[2]}, target {lines[-1]['zeros_path']:.1%}", lines)
    return found


def made_figures(shipped: Shipped, logs: Path) -> dict:
    """Return {file name: figure} for all figures whose data exist. logs: folder of the stages' logs."""
    figures = needed("tools.figures")
    claim = shipped.claim

    def numbers(text: str) -> list[float]:
        return [float(number) for number in re.findall(r"\d+\.\d+", text)]

    entries = {name: (numbers(accuracy), [(x, c) for c, text in zip(CONVENTIONS, scores) for x in numbers(text)])
               for name, _, accuracy, *scores in BOARD}
    made = {
        "layers": figures.layers_figure(counting.weight_summary(shipped.model)["tensors"],
                                        {entry["name"]: entry["bits"] for entry in claim["tensors"]}),
        "cost": figures.cost_figure(
            {STORED[kind]: bits for kind, bits in claim["counts"]["storage"].items() if kind != "total"},
            {c: {KINDS.get(kind, kind): sum(row.bits for row in rows if row.kind == kind)
                 for kind in dict.fromkeys(row.kind for row in rows)} for c, rows in shipped.counted.items()}),
        "board": figures.board_figure({each.name: (each.accuracy, each.scores) for each in (shipped, *shipped.others)},
                                      entries),
        "methods": figures.methods_figure(by_seed(
            load_json(ROOT / "benchmarks" / BENCHMARKS["methods"][0])["rows"]))}
    if found := stage_logs(logs):
        made["training"] = figures.training_figure([load_lines(log) for log in found])
    if found := feedback_stages(logs):
        made["sparsity"] = figures.sparsity_figure(found)
    return made


def measure(checkpoint: Path, network: str | None, logs: Path) -> Shipped:
    """Return the network of a checkpoint as that at the root, with all that the tables are made from."""
    model, claim = checkpoints.load(checkpoint, network)
    if missing := LATER - claim.keys():
        raise BadInput(f"{claims.claim_path(checkpoint)} holds no {', '.join(sorted(missing))}: tools.ship records it")
    others = tuple(Shipped(path.parent.name, *checkpoints.load(path)) for path in shipping.in_folders(ROOT))
    tested, dense = logs / "dense.tested.json", None
    if tested.is_file():
        stage = read_stage(logs / "dense.jsonl")
        dense = load_json(tested) | {"freed": shipping.freed(logs), "images_trained": stage.images(stage.lines[-1])}
    return Shipped("", model, claim, others, dense)


def main(argv=None) -> int:
    parser = command_line(__doc__)
    checkpoints.add_option(parser)
    networks.add_option(parser, networks.CLAIM)
    parser.add_argument("--logs", type=some_path, default=ROOT / "record", metavar="DIR",
                        help="folder with the stages' logs and dense.tested.json (record)")
    parser.add_argument("--to", type=some_path, default=ROOT, metavar="DIR",
                        help="folder to write the pages and figures/ to (the repository's)")
    parser.add_argument("--check", action="store_true", help="compare the tables, write nothing")
    args = parser.parse_args(argv)
    if not args.check:
        needed("tools.figures")  # before any work: matplotlib may be missing
    shipped = measure(args.checkpoint, args.network, args.logs)
    contents, before = tables(shipped), {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    pages = {page: fill(text, contents) for page, text in before.items()}
    if args.check:
        stale, claim = [page for page in PAGES if pages[page] != before[page]], claims.claim_path(args.checkpoint)
        if stale:
            raise BadInput(f"the tables of {', '.join(stale)} are not those of {claim}; run python -m tools.report")
        print(f"the tables of {', '.join(PAGES)} are those of {claim}")
        return 0
    for name, figure in made_figures(shipped, args.logs).items():
        with replacing(args.to / "figures" / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    for page, text in pages.items():
        save_text(text, args.to / page)
    print(f"wrote the figures and the tables of {', '.join(PAGES)} to {args.to}")
    return 0


if __name__ == "__main__":
    run_script(main)
