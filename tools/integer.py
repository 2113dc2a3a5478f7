"""Execute a shipped network in exact integer arithmetic (see compressed/integer_network.py).

    python -m tools.integer                   the shipped checkpoint: accuracy, comparison with exact_network,
                                              accumulators
    python -m tools.integer --checkpoint F    another checkpoint: a .pt with its claim, or an .mnet

exact_network computes the same integers in floats that are wide enough to hold them: the logits of both must be the
same to the last bit.
"""
import sys
from collections import defaultdict

from torch import nn

from compressed import checkpoints, cifar100, claims, datasets, threads
from compressed.command_line import run_script
from compressed.evaluation import in_batches, logits
from compressed.exact_network import exact_network
from compressed.files import to_json
from compressed.formats import signed_bits
from compressed.integer_network import IntegerNetwork
from tools.agreement import agreement, describe, option_parser

BATCH = 8  # images: their feature maps fit into a CPU's cache


def compare(network: IntegerNetwork, floats: nn.Module, data: cifar100.Images) -> dict:
    """Run both networks on all images, on every core.

    Returns what tools.agreement counts, and "accumulators": {"layer", "bound", "bits", "seen", "seen_bits",
    "value_bits"} of each layer and mean. bound, seen: the lowest and the highest accumulator that the stored codes
    allow, and that occurred. bits: of these in two's complement. value_bits: of the aligned sum to which the
    accumulator contributes.
    """
    ranges, rows = defaultdict(list), []

    def watch(name, sums):
        ranges[name].append(tuple(map(int, sums.aminmax())))

    found = in_batches(lambda images: network(images, watch), data.images, BATCH)
    # the exact network's logits are float32: exact values that are rounded once, at the very end
    found = (found.double() * 2.0**network.logit_exponent).float()
    for value in (*network.values, network.logits):
        for term in value.terms:
            if term.branch.kind in ("layer", "mean"):
                bound, seen = ((min(lows), max(highs)) for lows, highs in
                               (zip(*term.reach), zip(*ranges[term.branch.name])))
                rows.append({"layer": term.branch.name, "bound": bound, "bits": signed_bits(*bound), "seen": seen,
                             "seen_bits": signed_bits(*seen), "value_bits": value.bits})
    return agreement(found, logits(floats, data.images), data.labels) | {"accumulators": rows}


def text(report: dict) -> str:
    lines = [*describe("integers", report), "",
             "Accumulators: range that the stored codes allow; range on these images; bits of the aligned sum",
             f"{'layer':<20}{'lowest':>13}{'highest':>13}{'bits':>6}{'lowest seen':>13}{'highest seen':>14}{'bits':>6}"
             f"{'sum bits':>10}"]
    for row in report["accumulators"]:
        (low, high), (lowest, highest) = row["bound"], row["seen"]
        lines.append(f"{row['layer']:<20}{low:>13,}{high:>13,}{row['bits']:>6}{lowest:>13,}{highest:>14,}"
                     f"{row['seen_bits']:>6}{row['value_bits']:>10}")
    return "\n".join(lines)


def main(argv=None) -> int:
    """Print the report; return 2 if the logits of any image differ."""
    threads.prepare()
    parser = option_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(argv)
    if args.record:
        claims.recordable(args.checkpoint)  # before anything is computed
    model, claim = checkpoints.load(args.checkpoint, args.network)
    network = IntegerNetwork(model, claim)
    data, name = datasets.chosen(args, "test", network=model, most=args.images)
    if args.record:
        datasets.check_same(data.data_set, claim.get("data_set"), args.checkpoint)
    report = compare(network, exact_network(model, claim["activations"]), data)
    if args.record:  # before printing: the reader of a pipe may have exited
        claims.record(args.checkpoint, "integer", {"data": name} | report, claim)
    report = {"checkpoint": str(args.checkpoint)} | report
    print(to_json(report, indent=1) if args.json else text(report), flush=True)
    if report["identical"] < report["images"]:
        print(f"integer.py: exact_network has other logits for {report['images'] - report['identical']} of "
              f"{report['images']} images", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_script(main)
