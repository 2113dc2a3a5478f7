"""Write the tables and figures of the pages, from the shipped checkpoints, their claims and the training logs.

    python -m tools.report            writes figures/*.png (see tools/figures.py), and the tables in PAGES between
                                      <!-- NAME --> and <!-- end NAME -->
    python -m tools.report --check    writes nothing; exit status 2 if a table in the pages is out of date
"""
import dataclasses
import re
import statistics
from pathlib import Path

from torch import nn

from compressed import checkpoints, claims, counting, networks, shipping
from compressed.command_line import command_line, needed, run_script, some_path
from compressed.counting import CONVENTIONS
from compressed.errors import BadInput
from compressed.files import load_json, load_lines, save_text
from compressed.graph import trace, weight_layers
from compressed.mnet import stated_formats
from training.runs import stage_logs

KINDS = {"conv": "convolutions", "batchnorm": "BatchNorm (requantization)", "relu": "ReLU", "add": "residual additions",
         "mean": "average pooling", "linear": "linear layer"}
STORED = {"weights": "weights that are stored", "masks": "masks, one bit for each position",
          "batchnorm": "BatchNorm scales and shifts", "biases": "biases of the linear layer",
          "steps": "steps of all grids, at 32 bits", "total": "total"}
ROOT = shipping.ROOT
PAGES = ("README.md", "ACCOUNT.md", "benchmarks/README.md", "record/README.md")


# ---- What is known -------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Entry:
    """Hold a published entry of the challenge for CIFAR-100.

    name: with its rank (a team may have several entries). accuracy: in %; the first belongs to the score. scores:
    {accumulator convention: published scores}. said: text to show instead of the accuracy.
    """
    name: str
    network: str
    accuracy: tuple[float, ...]
    scores: dict[str, tuple[str, ...]]
    said: str = ""


BOARD = (
    Entry("RIAIR, 1st", "DenseNet-100 k=12, 75% sparse, 4-bit weights and activations (verified: 0.0044)",
          (80.17, 80.39),
          {"32-bit": ("0.008544",), "fixed": ("0.005234", "0.005236", "0.005440"),
           "tree": ("0.004169", "0.004171", "0.004375")}, "80.17 in float16, 80.39 in float32"),
    Entry("KAIST AI ver1, 2nd", "450,456 weights, 60% sparse, 16-bit", (80.07,), {"32-bit": ("0.0054454",)}),
    Entry("KAIST AI ver2, 3rd", "471,184 weights, 60% sparse, 16-bit", (80.04,), {"32-bit": ("0.0056215",)}),
    Entry("OSI AI, 4th", "470,776 weights, 64% sparse, early exit, 16-bit", (80.04,), {"32-bit": ("0.0058",)}),
    Entry("MSUNet-v3, 5th", "ternary", (80.13,), {"32-bit": ("0.0108",)}),
    Entry("Woody", "the sister submission, 8/6 bits; its own count, and the verified one", (80.06,),
          {"tree": ("0.0155", "0.0188")}))


# shipped networks that are not ours, by their specification: (their name everywhere, what the pages say of them)
OTHERS = {"mobilenet_v2:KaistMobileNetV2": (
    "KAIST AI's network, compressed further",
    "table, masks and most of the training are KAIST AI's ([MIT licence](LICENSE), Copyright (c) 2019 Kthyeon), whose "
    "authors chose the epoch by test accuracy.")}


@dataclasses.dataclass(frozen=True)
class Shipped:
    """Hold a shipped network: its folder ("" for the root), its model and its claim."""
    folder: str
    model: nn.Module
    claim: dict

    @property
    def spec(self) -> str:
        return self.claim.get("network", {}).get("spec", networks.DEFAULT)

    @property
    def name(self) -> str:
        ours = f"ours, {self.folder}/" if self.folder else "ours"
        return OTHERS[self.spec][0] if self.spec in OTHERS else ours

    @property
    def note(self) -> str:
        """The sentence that stands below a table with another's network; "" for ours."""
        if self.spec not in OTHERS:
            return ""
        return f"\n\n*{self.name}* ([{self.folder}/]({self.folder})): {OTHERS[self.spec][1]}"

    def correct(self) -> str:
        """Return the test accuracy as text: with the number of images."""
        accuracy = self.claim["accuracy"]
        return f"**{self.accuracy:.2f}%** ({accuracy['correct']:,} of {accuracy['images']:,})"

    def score_text(self) -> str:
        return ", ".join(f"{score:.4f}" for score in self.scores.values())

    @property
    def accuracy(self) -> float:
        """The test accuracy in %."""
        return 100 * self.claim["accuracy"]["correct"] / self.claim["accuracy"]["images"]

    @property
    def scores(self) -> dict[str, float]:
        return {c: self.claim["counts"]["score"][c]["score"] for c in CONVENTIONS}

    def weight_bits(self) -> list[int]:
        """Return the bits of all layers' weights."""
        layers = {f"{name}.weight" for name, _ in weight_layers(self.model)}
        return [entry["bits"] for entry in self.claim["tensors"] if entry["name"] in layers]

    def description(self) -> str:
        width = networks.width(self.spec)  # None for another network than the submission's
        name = self.spec.partition(":")[2] if width is None else f"MobileNetV2 x{width:g}"
        weights = self.claim["counts"]["weights"]["all"]
        bits = ["/".join(map(str, sorted(set(each)))) for each in (
            self.weight_bits(), [entry["bits"] for entry in self.claim["activations"]])]
        return (f"{name}, {weights['total']:,} weights, {weights['sparsity']:.0%} sparse, {bits[0]}-bit weights, "
                f"{bits[1]}-bit activations")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Hold the data from which the tables are made.

    claim: of the checkpoint at the root. counted: {accumulator convention: rows of all operations}. theirs: totals by
    the submission's convention. dense: result of testers.py --json for record/dense.pt, the dense baseline. networks:
    all shipped networks, that at the root first.
    """
    claim: dict
    counted: dict[str, list[counting.Row]]
    theirs: dict[str, int]
    dense: dict
    networks: list[Shipped]

    @property
    def stages(self) -> dict[str, dict]:
        return {stage["stage"]: stage for stage in self.claim["made_by"]["training"]}

    def percent(self, correct: int) -> str:
        return f"{100 * correct / self.claim['accuracy']['images']:.2f}%"

    def notes(self) -> str:
        return "".join(network.note for network in self.networks)

    def images(self) -> int:
        """Return how many images all stages trained on."""
        return sum(stage["last_epoch"]["step"] * stage["settings"]["batch_size"] for stage in self.stages.values())

    def hours(self) -> str:
        """Return the training time of all stages by their logs, summed for each kind of device."""
        seconds = {}
        for stage in self.stages.values():
            where = device(machine(stage["machine"]))
            seconds[where] = seconds.get(where, 0) + stage["last_epoch"]["seconds"]
        return ", ".join(f"{x / 3600:.1f} h on {where}" if x > 3600 else f"{x / 60:.0f} min on {where}"
                         for where, x in seconds.items())


def machine(recorded: dict | str) -> dict:
    """Return the machine of a stage's record as a dict: "device", "cores", "processes", and versions.

    Older records have a text, "1 process(es), CPU, 2 core(s), torch 2.14.1, Python 3.11.7" or a part of it.
    """
    if isinstance(recorded, dict):
        return recorded
    fields = {"cores": 1, "processes": 1}
    for part in recorded.split(", "):
        if number := re.fullmatch(r"(\d+) (core|process)\W?e?s\W?", part):
            fields[{"core": "cores", "process": "processes"}[number[2]]] = int(number[1])
        elif version := re.fullmatch(r"(torch|Python) (\S+)", part):
            fields[version[1].lower()] = version[2]
        else:
            fields["device"] = part
    return fields


def device(machine: dict) -> str:
    """Return the number and kind of a machine's devices as text: "2 CPU cores", "1 NVIDIA H200"."""
    if machine["device"] != "CPU":
        return f"{machine['processes']} {machine['device']}"
    cores = machine["cores"] * machine["processes"]
    return f"{cores} CPU core{'s' * (cores > 1)}"


def output_lines(accuracy: dict, counts: dict) -> list[str]:
    """Return some lines that `bash run.sh` prints; tests/test_testers.py compares them with its real output."""
    scores = [counts["score"][c]["score"] for c in CONVENTIONS]
    return [f"Accuracy: {accuracy['correct']}/{accuracy['images']} ({accuracy['correct'] / accuracy['images']:.2%})",
            f"{'Score':<44}" + "".join(f"{convention:>12}" for convention in CONVENTIONS),
            f"  {'score':<42}" + "".join(f"{value:>12.5f}" for value in scores)]


# ---- Tables: of the shipped network --------------------------------------------------------------

LOG = "[record](record/README.md)"
TEST, CHECK = "`python testers.py`", "`python check_model_operations.py`"
DENSE = "`python testers.py --checkpoint record/dense.pt`"
HEAD = ("", "this repository", "the submission", "command")  # what the submission reported is from its README


def summary(m: Measured) -> str:
    counts = m.claim["counts"]
    zeros = [f"{100 * counts['weights'][key]['sparsity']:.2f}%" for key in ("submission", "all")]
    return table(HEAD, [
        ("**accuracy, shipped: masked and quantized**", m.networks[0].correct(), "80.12%", TEST),
        ("dense baseline", m.percent(m.dense["correct"]), "81.92%", DENSE),
        ("images trained; time", f"{m.images() / 1e6:.2f}M; {m.hours()}", "30M, and dense training", LOG),
        ("zeros, by the submission's convention (exact)", f"{zeros[0]} ({zeros[1]})", "76.95%", TEST),
        ("parameter storage; operations (32-bit units)", f"{counts['storage']['total'] / 32e6:.4f}M; "
         f"{counts['operations']['32-bit']['bits'] / 32e6:.2f}M", "left open", CHECK),
        ("score: 32-bit, fixed-length, tree accumulators", m.networks[0].score_text(), "left open", CHECK),
        *((f"**{other.name}**: accuracy; score", f"{other.correct()}; {other.score_text()}", "-", "`bash run.sh`")
          for other in m.networks[1:])]) + m.notes()


def results(m: Measured) -> str:
    counts, by, accuracy = m.claim["counts"], "by the submission's convention", m.claim["accuracy"]
    part = accuracy.get("without_duplicates")  # where the order of the published test file was known
    unseen = [] if part is None else [
        ("the same, of test images without a near-duplicate in the train set",
         f"{part['correct'] / part['images']:.2%} ({part['correct']:,} of {part['images']:,})", "-", TEST)]
    exact, theirs, bits = counts["weights"]["all"], counts["weights"]["submission"], m.networks[0].weight_bits()
    lost = 100 * (m.dense["correct"] / m.dense["images"] - accuracy["correct"] / accuracy["images"])
    by_penalty = m.stages["rew"]["last_epoch"]["zeros"] if "rew" in m.stages else None
    return table(HEAD, [
        ("dense baseline, test accuracy", m.percent(m.dense["correct"]), "81.92%", DENSE),
        ("masked, not quantized", m.percent(m.claim["accuracy_by_step"][0]["correct"]), "-",
         "`python testers.py --checkpoint record/masked.pt`"),
        ("**shipped: masked and quantized**", m.networks[0].correct(), "80.12%", TEST), *unseen,
        ("lost by masking and quantizing", f"{lost:.2f} points", "-", "these commands"),
        ("weights, convolutions and linear, exact", f"{exact['total']:,}", "-", TEST),
        ("zeros, exact", f"{exact['zeros']:,} ({100 * exact['sparsity']:.2f}%)", "-", TEST),
        ("of these, made by the penalty; the others by the mask's threshold",
         "-" if by_penalty is None else f"{by_penalty:,} ({by_penalty / exact['zeros']:.0%})", "-",
         "`record/rew.jsonl`"),
        (f"weights, {by}", f"{theirs['total']:,}", "3,905,632", TEST),
        (f"zeros, {by}", f"{theirs['zeros']:,}", "3,005,523", TEST),
        (f"non-zeros, {by}", f"{theirs['nonzeros']:,}", "900,109", TEST),
        (f"sparsity, {by}", f"{theirs['sparsity']:.4f}", "0.7695", TEST),
        (f"compression rate, {by}", f"{theirs['compression']:.4f}", "4.3391", TEST),
        ("bits of weights", f"6 in {bits.count(6)} layers, 8 in {bits.count(8)}", "6 in 9 layers, 8 in 49", TEST),
        ("parameter storage (32-bit parameters)", f"{counts['storage']['total'] / 32e6:.4f}M", "left open", TEST),
        (f"operations, {by}", f"{m.theirs['bits'] / 32e6:.2f}M", "231.25M", CHECK),
        ("operations, every operation and our non-zeros", f"{counts['operations']['32-bit']['bits'] / 32e6:.2f}M", "-",
         CHECK)])


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
        last, settings, where = stage["last_epoch"], stage["settings"], machine(stage["machine"])
        planned = settings["epochs"]
        epochs = planned if last["epoch"] == planned else f"{last['epoch']} of {planned}"
        rows.append((name, epochs, *(settings[key] for key in ("batch_size", "optimizer", "lr", "sizes")),
                     f"{last['zeros']:,}", f"{last['test_accuracy']:.2%}" if "test_accuracy" in last else "-",
                     f"{last['seconds'] / 60:.0f} min", f"{device(where)}, torch {where['torch']}"))
    return table(("stage", "epochs", "batch", "optimizer", "peak lr", "image sizes", "zeros", "test accuracy", "time",
                  "machine"), rows)


def score(m: Measured) -> str:
    rows = []
    for c in CONVENTIONS:
        cost, scored = m.claim["counts"]["operations"][c], m.claim["counts"]["score"][c]
        rows.append((c, *(f"{cost[key] / 32e6:.3f}M" for key in ("multiplication_bits", "addition_bits", "bits")),
                     *(f"{scored[key]:.5f}" for key in ("storage", "operations", "score"))))
    return table(("accumulators", "multiplications", "additions", "operations", "storage / 36.5M",
                  "operations / 10.49B", "score"), rows)


def storage(m: Measured) -> str:
    return table(("storage", "bits", "32-bit parameters", "kB"), [
        (STORED[kind], f"{bits:,}", f"{bits / 32e6:.4f}M", f"{bits / 8e3:,.1f}")
        for kind, bits in m.claim["counts"]["storage"].items()])


def account(m: Measured) -> str:
    rows = []
    for kind in [*dict.fromkeys(each.kind for each in m.counted["32-bit"]), "all"]:
        chosen = {c: [row for row in found if kind in (row.kind, "all")] for c, found in m.counted.items()}
        sums = {c: counting.totals(found) for c, found in chosen.items()}
        rows.append((KINDS.get(kind, kind), len(chosen["32-bit"]), f"{sums['32-bit']['multiplications']:,}",
                     f"{sums['32-bit']['additions']:,}", *(f"{each['bits'] / 32e6:.3f}" for each in sums.values())))
    return table(("operation", "how many", "multiplications", "additions", "32-bit", "fixed", "tree"), rows)


def dead(m: Measured) -> str:
    removed = m.claim["dead_weight_removed"]
    share = removed["weights"] / (removed["weights"] + m.claim["counts"]["weights"]["all"]["nonzeros"])
    return table(("dead", "values set to zero", "saved"), [
        ("weights", f"{removed['weights']:,}", f"{share:.2%} of the non-zero weights, and the operations on them"),
        ("BatchNorm scales and shifts", f"{removed['scales and shifts']:,}",
         "nothing: these tensors are stored dense")])


def packed(m: Measured) -> str:
    file, counted = m.claim["packed"], m.claim["counts"]["storage"]["total"]
    return table(("packed file", "bytes", "32-bit parameters", "difference from the counted storage"), [
        (f"`{file['file']}`", f"{file['bytes']:,}", f"{file['bytes'] / 4e6:.4f}M",
         f"{100 * (8 * file['bytes'] / counted - 1):+.3f}%")])


def executed(m: Measured) -> str:
    rows = []
    for engine, found, identical, command in (
            ("integers", m.claim["integer"], "identical", "`python -m tools.integer --record`"),
            ("onnxruntime, 8-bit", m.claim["onnx"], "same_logits", "`python -m tools.export_onnx --record`")):
        rows.append((engine, *(f"{found[key]:,}" for key in ("images", "correct", "agree", identical)), command))
    return table(("executed by", "images", "correct", "same prediction as `testers.py`",
                  "same logits to the last bit", "command"), rows)


def accumulators(m: Measured) -> str:
    """Return the table of the five layers with the widest accumulator bounds; the claim has all layers."""
    widest = sorted(m.claim["integer"]["accumulators"], key=lambda row: row["bound"][0] - row["bound"][1])[:5]
    return table(("layer", "bound: lowest", "highest", "bits", "occurred: lowest", "highest", "bits",
                  "bits of the aligned sum"), [
        (row["layer"], *(f"{x:,}" for x in row["bound"]), row["bits"], *(f"{x:,}" for x in row["seen"]),
         row["seen_bits"], row["value_bits"]) for row in widest])


def board(m: Measured) -> str:
    """Return the table of our networks, whose scores are from their claims, and the challenge's entries."""
    def published(entry: Entry, convention: str) -> str:
        values = entry.scores.get(convention, ("-",))
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"

    ours = [(f"**{network.name}**, not entered", network.description(), f"**{network.accuracy:.2f}**",
             *(f"**{value:.4f}**" for value in network.scores.values())) for network in
            sorted(m.networks, key=lambda network: network.scores["32-bit"])]
    return table(("entry", "network", "accuracy", "32-bit additions", "fixed-length accumulators", "adder tree"), [
        *ours, *((entry.name, entry.network, entry.said or entry.accuracy[0],
                  *(published(entry, c) for c in CONVENTIONS)) for entry in BOARD)]) + m.notes()


TABLES = (summary, results, output, steps, stages, score, storage, account, dead, packed, executed, accumulators, board)
# {table: keys of the claim that it needs and that other tools add after quantize.py}; it is left out without them
LATER = {packed: {"packed"}, executed: {"integer", "onnx"}, accumulators: {"integer"}}


# ---- Tables: of the benchmarks -------------------------------------------------------------------

def training_table(measured: dict) -> str:
    """Return the table of training speed: images/s of every loop (median and range), ratios, and parts of a step."""
    rows = [(f"{name}, images/s", f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})")
            for name, speeds in measured["images_per_second"].items()]
    rows += [(name, f"**{ratio:.2f}**") for name, ratio in measured["ratios"].items()]
    shares = {part: seconds for part, seconds in measured["step"].items() if part != "whole"}
    rows += [(f"share of a step: {part}", f"{100 * seconds / sum(shares.values()):.2f}%")
             for part, seconds in shares.items()]
    return table((f"batch {measured['batch_size']}, {measured['precision']}",
                  f"median of {len(next(iter(measured['images_per_second'].values())))} rounds (range)"), rows)


def depthwise_table(measured: dict) -> str:
    """Return the table of depthwise convolutions: milliseconds of those with a stride and of the others."""
    rows = []
    for what, stride in (("14 without a stride", 1), ("3 with a stride", 2)):
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


BENCHMARKS = {"speed": ("training_speed.json", training_table),
              "speed_avx2": ("training_speed_avx2.json", training_table),
              "depthwise": ("depthwise_shapes.json", depthwise_table),
              "inference": ("inference_speed.json", inference_table)}


# ---- Pages and figures ---------------------------------------------------------------------------

def table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tables(measured: Measured) -> dict[str, str]:
    """Return {NAME: table} for all tables whose data exist."""
    contents = {make.__name__: make(measured) for make in TABLES if LATER.get(make, set()) <= measured.claim.keys()}
    return contents | {name: make(load_json(ROOT / "benchmarks" / file)) for name, (file, make) in BENCHMARKS.items()
                       if (ROOT / "benchmarks" / file).is_file()}


def fill(page: str, contents: dict[str, str]) -> str:
    """Return the page with the text between <!-- NAME --> and <!-- end NAME --> replaced, for every NAME in it."""
    for name, text in contents.items():
        between = f"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        page = re.sub(between, lambda m: m[1] + text + "\n" + m[2], page, flags=re.S)
    return page


def filled_pages(folder: Path, contents: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return {page: (its text, the text with current tables)}.

    Raises BadInput for a table without a place in the pages, and for a place without a table.
    """
    pages = {page: (folder / page).read_text() for page in PAGES}
    place = re.compile(r"<!-- (\w+) -->\n(?=.*<!-- end \1 -->)", re.S)
    places = {name for text in pages.values() for name in place.findall(text)}
    for name in sorted(contents.keys() - places):
        raise BadInput(f"none of {', '.join(PAGES)} has a place <!-- {name} --> ... <!-- end {name} -->")
    for name in sorted(places - contents.keys()):
        raise BadInput(f"nothing is measured for the table {name!r}: run the commands of training/README.md, or the "
                       "benchmark named there")
    return {page: (text, fill(text, contents)) for page, text in pages.items()}


def made_figures(measured: Measured, logs: list[Path]) -> dict:
    """Return {file name: figure} for all figures whose data exist. logs: paths of the stages' logs."""
    figures = needed("tools.figures")
    claim, ours = measured.claim, measured.networks
    entries = {entry.name: (entry.accuracy, [(float(value), c) for c, values in entry.scores.items()
                                             for value in values]) for entry in BOARD}
    made = {
        "layers": figures.layers_figure(counting.weight_summary(ours[0].model)["tensors"],
                                        {entry["name"]: entry["bits"] for entry in claim["tensors"]}),
        "cost": figures.cost_figure(
            {STORED[kind]: bits for kind, bits in claim["counts"]["storage"].items() if kind != "total"},
            {c: {label: sum(row.bits for row in rows if row.kind == kind) for kind, label in KINDS.items()}
             for c, rows in measured.counted.items()}),
        "board": figures.board_figure({each.name: (each.accuracy, each.scores) for each in ours}, entries)}
    if logs:
        made["training"] = figures.training_figure([load_lines(log) for log in logs])
    return made


def measure(checkpoint: Path, logs: Path) -> Measured:
    """Return the data of a checkpoint that is shipped at the root, and of the networks in folders of their own."""
    model, claim = checkpoints.load(checkpoint)
    others = [Shipped(path.parent.name, *checkpoints.load(path)) for path in shipping.in_folders(ROOT)]
    formats, operations = stated_formats(model, claim), trace(model)
    return Measured(claim, {c: counting.count(operations, formats, c) for c in CONVENTIONS},
                    counting.submission_operations(operations), load_json(logs / "dense.tested.json"),
                    [Shipped("", model, claim), *others])


def main(argv=None) -> int:
    parser = command_line(__doc__)
    checkpoints.add_option(parser)
    parser.add_argument("--logs", type=some_path, default=ROOT / "record", metavar="DIR",
                        help="folder with the stages' logs and dense.tested.json (record)")
    parser.add_argument("--pages", type=some_path, default=ROOT, metavar="DIR",
                        help="folder that holds the pages (the repository's)")
    parser.add_argument("--to", type=some_path, metavar="DIR",
                        help="folder to write the pages and figures/ to (that of --pages)")
    parser.add_argument("--check", action="store_true", help="compare the tables, write nothing")
    args = parser.parse_args(argv)
    if not args.check:
        needed("tools.figures")  # before any work: matplotlib may be missing
    measured, to = measure(args.checkpoint, args.logs), args.to or args.pages
    pages = filled_pages(args.pages, tables(measured))
    if args.check:
        claim_file = claims.claim_path(args.checkpoint)
        for page, (text, wanted) in pages.items():
            if text != wanted:
                raise BadInput(f"{args.pages / page}: its tables are not those of {claim_file}; run python -m "
                               "tools.report")
        print(f"the tables of {', '.join(PAGES)} are those of {claim_file}")
        return 0
    (to / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in made_figures(measured, stage_logs(args.logs)).items():
        figure.savefig(to / "figures" / f"{name}.png", dpi=110, metadata={"Software": None})
        print(f"wrote {to / 'figures' / f'{name}.png'}")
    for page, (_, wanted) in pages.items():
        save_text(wanted, to / page)
        print(f"wrote the tables of {to / page}")
    return 0


if __name__ == "__main__":
    run_script(main)
