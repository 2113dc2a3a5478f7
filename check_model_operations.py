"""Count operations, storage and score of a checkpoint by the MicroNet Challenge's rules, from its stored values.

    python check_model_operations.py                   the shipped checkpoint: a row for every operation, then the score
    python check_model_operations.py --checkpoint F    another one; its claim, if it has one, is F with the suffix .json
    python check_model_operations.py --sparsity 0.5    what if: no checkpoint, half of every layer's weights zero
    python check_model_operations.py --dense           what if: no checkpoint, no weight zero
    python check_model_operations.py --checkpoint F.t7 one of the networks that KAIST AI published, as
                                                       python -m training.teachers downloads them

The widths of weights are found in the stored values and compared with the claim. If the values need more bits than it
claims, or if it is about another file, this is printed, and the exit status is 2. Activation widths are not stored in a
checkpoint: they are the claim's (testers.py measures the resulting accuracy), and 32 bits without a claim. The rules
are in compressed/counting.py.
"""
import argparse
import copy
import sys
from collections import Counter
from fractions import Fraction

if __name__ == "__main__":
    import compressed.interrupt  # noqa: F401

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compressed import checkpoints, counting, kaist, networks
from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import command_line, number, run_script
from compressed.counting import CONVENTIONS, NO_THOP, thop_counts
from compressed.errors import BadInput
from compressed.files import sha256, to_json
from compressed.formats import WORD, Formats, float_formats, found_formats, what_if
from compressed.graph import prepare, read_graph, weight_layers

# ---- The report ----------------------------------------------------------------------------------

def flop_counter(model: nn.Module) -> int:
    """Return the floating-point operations that torch's own counter finds: 2 for each multiply-accumulate."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))
    return counter.get_total_flops()


def make_report(model: nn.Module, formats: Formats, density: Fraction | None = None) -> dict:
    """Return everything that is printed, in exact integers of bits and plain containers: it is the JSON output, too.

    density: as in counting.count.
    """
    operations, whole = read_graph(model).operations, Fraction(1)
    rows = [counting.count(operations, formats, convention, density) for convention in CONVENTIONS]
    found, baseline = counting.summary(model, formats, density), counting.summary(model, float_formats(model), whole)
    return {
        "rows": [{"name": first.name, "kind": first.kind, "outputs": first.outputs,
                  "multiplications": first.multiplications.total(), "additions": first.additions.total(),
                  "conventions": {c: {"multiplications": row.multiplications, "additions": row.additions,
                                      "bits": row.bits} for c, row in zip(CONVENTIONS, (first, *others))}}
                 for first, *others in zip(*rows)],
        "totals": found["operations"], "dense": counting.summary(model, formats, whole)["operations"],
        "storage": found["storage"], "score": found["score"],
        "float32_dense": {"totals": baseline["operations"]["32-bit"], "storage": baseline["storage"]["total"],
                          "score": baseline["score"]["32-bit"]},
        "submission": {"dense": counting.submission_operations(operations),
                       "sparsity_0.5": counting.submission_operations(operations, Fraction(1, 2))},
        "checks": {"macs": counting.macs(operations), "flop_counter": flop_counter(model), "thop": thop_counts(model),
                   "batchnorm_outputs": sum(op.outputs for op in operations if op.kind == "batchnorm")},
    }


# ---- The report as text --------------------------------------------------------------------------

def table(columns: str, *rows) -> list[str]:
    """Return rows of texts as lines. columns: alignment and width of each column, as in a format specification."""
    return ["".join(f"{text:{column}}" for text, column in zip(row, columns.split())) for row in rows]


def millions(bits: int) -> str:
    """Return bits as millions of 32-bit operations or parameters."""
    return f"{bits / WORD / 1e6:.3f}"


def widths(counts: dict[int, int]) -> str:
    """Return the range of widths that occur in {bits: count}, such as "8-21"."""
    used = [bits for bits, count in counts.items() if count]
    return "-".join(map(str, sorted({min(used), max(used)}))) if used else ""


def row_lines(rows: list[dict]) -> list[str]:
    heads, wide = "operation kind mults bits adds fixed tree", max(22, *(len(row["name"]) + 1 for row in rows))
    return ["", "Every operation for one image. Bits of additions, and cost in millions of 32-bit operations, by",
            "accumulator convention (32-bit, fixed length, adder tree). Bits of multiplications: fixed length.", "",
            *table(f"<{wide} <14 >11 >6 >12 >6 >7 >10 >9 >9", [*heads.split(), "M 32-bit", "M fixed", "M tree"], *(
                (row["name"], row["kind"], f"{row['multiplications']:,}",
                 widths(row["conventions"]["fixed"]["multiplications"]), f"{row['additions']:,}",
                 *(widths(row["conventions"][c]["additions"]) for c in ("fixed", "tree")),
                 *(millions(row["conventions"][c]["bits"]) for c in CONVENTIONS)) for row in rows))]


def total_lines(report: dict) -> list[str]:
    def picked(label: str, part: str, key: str, text=millions) -> list[str]:
        return [f"  {label}", *(text(values[key]) for values in report[part].values())]

    costs = {row["kind"]: Counter() for row in report["rows"]}
    for row in report["rows"]:
        costs[row["kind"]].update({c: row["conventions"][c]["bits"] for c in CONVENTIONS})
    one, dense, base = report["totals"]["32-bit"], report["dense"]["32-bit"], report["float32_dense"]
    labels = {"weights": "weights that are stored", "masks": "mask, one bit a position", "batchnorm": "BatchNorm",
              "biases": "biases", "steps": "steps of the grids", "total": "all"}
    scores = {"storage / 36.5M": "storage", "operations / 10.49B": "operations", "score": "score"}
    return ["", *table("<44 >12 >12 >12", ("Millions of 32-bit operations", *CONVENTIONS),
                       *((f"  {kind}", *(millions(cost[c]) for c in CONVENTIONS)) for kind, cost in costs.items()),
                       picked("multiplications", "totals", "multiplication_bits"),
                       picked("additions", "totals", "addition_bits"), picked("all", "totals", "bits"),
                       picked("all, as if no weight were zero", "dense", "bits")),
            f"  counts: {one['multiplications']:,} multiplications, {one['additions']:,} additions "
            f"(as if no weight were zero: {dense['multiplications']:,}, {dense['additions']:,})",
            "", *table("<30 >14 >24", ("Storage", "bits", "M 32-bit parameters"), *(
                (f"  {labels[kind]}", f"{bits:,}", f"{bits / WORD / 1e6:.4f}")
                for kind, bits in report["storage"].items())),
            "", *table("<44 >12 >12 >12", ("Score", *CONVENTIONS), *(
                picked(label, "score", key, "{:.5f}".format) for label, key in scores.items())),
            f"  the same network dense in float32: {millions(base['storage'])}M parameters, "
            f"{millions(base['totals']['bits'])}M operations, score {base['score']['score']:.4f}"]


def cross_check_lines(report: dict) -> list[str]:
    def parts(count):
        return " + ".join(f"{millions(count[key])}M" for key in ("multiplication_bits", "addition_bits")) + (
            f" = {millions(count['bits'])}M")

    submission, checks, weights = report["submission"], report["checks"], report.get("weights")
    macs, thop, norms = checks["macs"], checks["thop"], checks["batchnorm_outputs"]
    lines = ["", "The submission's convention (dense; 16-bit multiplications, 32-bit additions; neither residual "
             "additions nor the average)",
             f"  {submission['dense']['multiplications'] / 1e6:.2f}M multiplications, "
             f"{submission['dense']['additions'] / 1e6:.3f}M additions: {parts(submission['dense'])}",
             f"  with sparsity 0.5 in every layer: {parts(submission['sparsity_0.5'])}"]
    if weights and weights["submission"]:
        ours, theirs = weights["all"], weights["submission"]
        lines.append(f"  weights {theirs['total']:,} (exactly {ours['total']:,}), zeros {theirs['zeros']:,} "
                     f"({ours['zeros']:,}), non-zeros {theirs['nonzeros']:,} ({ours['nonzeros']:,}), "
                     f"sparsity {theirs['sparsity']:.4f} ({ours['sparsity']:.4f}), "
                     f"compression {counting.compression_text(theirs)} ({counting.compression_text(ours)})")
    twice = "twice as many, as it should be" if checks["flop_counter"] == 2 * macs else "NOT twice as many"
    why = f": the multiply-accumulates and 4 for each of {norms:,} BatchNorm outputs"
    return [*lines, "", "Cross-checks",
            f"  dense multiply-accumulates {macs:,}; torch's FlopCounterMode {checks['flop_counter']:,}, {twice}",
            f"  without {NO_THOP}" if thop is None else
            f"  thop {thop[0]:,} for one image, {thop[1]:,} for two" + why * (thop[0] == macs + 4 * norms)]


def width_lines(model: nn.Module, formats: Formats) -> list[str]:
    """Return one line for each kind of tensor: how many of them have how many bits."""
    weights = [f"{name}.weight" for name, _ in weight_layers(model)]
    groups = {"weight tensors": [formats.tensors[name].bits for name in weights],
              "BatchNorm and bias tensors": [g.bits for name, g in formats.tensors.items() if name not in weights],
              "activation points": [formats.activation(name, True).bits
                                    for name in read_graph(model).activation_points]}
    return [f"  {group}: " + ", ".join(f"{count} at {bits} bits" for bits, count in sorted(Counter(found).items()))
            for group, found in groups.items()]


# ---- The script ----------------------------------------------------------------------------------

AUTHORS = ("by the convention of its authors, KAIST AI (see compressed/kaist.py): {parameters:,.2f} parameters and "
           "{operations:,.0f} operations of 32 bits, score {score:.5f}; they publish 0.00562 for micronet_v2_pr_60.t7")


def published(checkpoint) -> checkpoints.Checkpoint:
    """Return one of KAIST AI's published networks."""
    model = prepare(kaist.load_micronet(checkpoint))
    return checkpoints.Checkpoint(checkpoint, sha256(checkpoint), model, None, found_formats(model), [])


def parse(argv) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--summary", action="store_true", help="leave out the row for every operation")
    parser.add_argument("--json", action="store_true", help="everything as JSON, in exact bits")
    alone = parser.add_mutually_exclusive_group()
    checkpoints.add_option(alone)
    alone.add_argument("--sparsity", type=number(Fraction, 0, 1), metavar="SHARE",
                       help="what if: this share of every layer's weights is zero")
    alone.add_argument("--dense", action="store_true", help="what if: no weight is zero")
    networks.add_option(parser, networks.CLAIM)
    parser.add_argument("--weight-bits", type=number(int, 1, WORD), metavar="N",
                        help="what if: every layer's weights have N bits; BatchNorm and biases keep theirs, 32 without "
                             "a checkpoint (quantize.py stores 16)")
    parser.add_argument("--activation-bits", type=number(int, 1, WORD), metavar="N",
                        help="every activation has N bits, and the image 8 (default: the claim's, or 32)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Print the report; return the exit status: 0, or 2 if the values contradict the claim."""
    args = parse(argv)
    source, problems, density, weights = {}, [], None, {}
    if args.dense or args.sparsity is not None:
        density = Fraction(1) if args.dense else 1 - args.sparsity
        model = prepare(networks.make(args.network or networks.DEFAULT))
        formats = float_formats(model)
        source["counted"] = (f"what if: the network alone, with {read_graph(model).points[-1].shape[0]} classes, "
                             f"{float(density):.4g} of every layer's weights non-zero")
    else:
        path = args.checkpoint
        if path.suffix == ".t7" and args.network:
            raise BadInput(f"--network {args.network}: {path} is read as a network of KAIST AI's; leave the option out")
        found = published(path) if path.suffix == ".t7" else checkpoints.read(path, args.network)
        model, claim, formats, problems = found.model, found.claim, found.formats, found.problems
        source |= {"counted": f"{path}, its own non-zeros", "sha256": found.sha256}
        if path.suffix == ".t7":
            source["authors"] = AUTHORS.format(**kaist.authors_count(model))
        source["widths"] = "found in the stored values; there is no claim"
        if claim is not None:
            if not problems and claim.get("counts") not in (None, counting.summary(model, formats)):  # it is optional
                problems.append(f"the counts that {found.claim_file} claims are not those of {path}")
            source["widths"] = f"claimed by {found.claim_file}, held against the stored values"
        weights = {"weights": counting.weight_summary(model)}
    if args.weight_bits or args.activation_bits:
        formats = what_if(formats, model, args.weight_bits, args.activation_bits)
        given = {"--weight-bits": args.weight_bits, "--activation-bits": args.activation_bits}
        source["what if"] = " ".join(f"{option} {bits}" for option, bits in given.items() if bits)
    report = {"source": source, "problems": problems} | make_report(model, formats, density) | weights
    report["formats"] = {name: {"bits": grid.bits, "grid": grid.kind} for name, grid in formats.tensors.items()}
    if report["checks"]["flop_counter"] != 2 * report["checks"]["macs"]:
        problems.append("torch's FlopCounterMode does not count two for each multiply-accumulate of this trace")
    if args.json:
        print(to_json(report, indent=1))
    else:
        lines = [f"{key}: {value}" for key, value in source.items()] + width_lines(model, formats)
        lines += [] if args.summary else row_lines(report["rows"])
        print("\n".join(lines + total_lines(report) + cross_check_lines(report)), flush=True)
    for problem in problems:
        print(f"check_model_operations.py: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    run_script(main)
