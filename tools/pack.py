"""Pack a shipped network into one small file, .mnet, that holds every stored bit and nothing else (see mnet.py).

    python -m tools.pack                                packs the shipped checkpoint
    python -m tools.pack --checkpoint F --out F.mnet    packs another one

What was packed is unpacked and compared value by value. Then a table shows the bytes of every section next to those
that the challenge's rules count for it. If F.mnet is written next to F.pt, its size and SHA-256 are recorded in the
claim, F.json, and so are new counts if the counting rules have changed since.
"""
from compressed import checkpoints, claims, counting, networks
from compressed.command_line import command_line, run_script, some_file
from compressed.files import check_outputs, sha256
from compressed.formats import WORD
from compressed.mnet import pack


def main(argv=None) -> int:
    parser = command_line(__doc__)
    checkpoints.add_option(parser)
    networks.add_option(parser, networks.CLAIM)
    parser.add_argument("--out", type=some_file, metavar="F.mnet",
                        help="file to write (default: the checkpoint's name with the suffix .mnet)")
    args = parser.parse_args(argv)
    checkpoint = args.checkpoint
    out = args.out or checkpoint.with_suffix(".mnet")
    check_outputs([out], [checkpoint, claims.claim_path(checkpoint)], suffix=".mnet")
    model, claim = checkpoints.load(checkpoint, args.network)
    sections = pack(model, claim, out)
    summary = counting.summary(model, claims.stated_formats(model, claim))
    if claims.claim_path(out).resolve() == claims.claim_path(checkpoint).resolve() and checkpoint.suffix != ".mnet":
        packed = {"file": out.name, "bytes": sections["total"], "sha256": sha256(out)}
        claims.record(checkpoint, "packed", packed, claim)
        if claim.get("counts", summary) != summary:
            claims.record(checkpoint, "counts", summary, claim)
            print(f"{claims.claim_path(checkpoint)}: the counts in it were outdated, and were replaced")

    counted = summary["storage"]
    print(f"{out}: {sections['total']:,} bytes, SHA-256 {sha256(out)}; unpacked, every value and format is the same")
    print(f"\n{'section':<12}{'bytes':>12}{'counted':>12}{'difference':>12}")
    for kind in ("weights", "masks", "batchnorm", "biases", "steps", "header", "checksum", "total"):
        size, rule = sections.get(kind, 0), counted.get(kind, 0) / 8
        print(f"{kind:<12}{size:>12,}{rule:>12,.1f}{size - rule:>+12,.1f}")
    total = 8 * sections["total"]
    print(f"\n{total / WORD / 1e6:.6f}M 32-bit parameters in the file, {counted['total'] / WORD / 1e6:.6f}M counted: "
          f"{total / counted['total'] - 1:+.4%}")
    return 0


if __name__ == "__main__":
    run_script(main)
