"""Write KAIST AI's published network as a checkpoint that quantize.py can fine-tune.

    python -m tools.kaist_checkpoint micronet_v2_pr_60.t7 --out runs/kaist/masked.average.pt
    python quantize.py --recipe kaist --checkpoint runs/kaist/masked.average.pt --out runs/kaist/net.pt

What comes out is *KAIST AI's network, compressed further*: layers, masks and most of the training are theirs (MIT
licence, Copyright (c) 2019 Kthyeon), and its authors chose the epoch by test accuracy.
"""
from compressed import counting, kaist, networks
from compressed.command_line import command_line, run_script, some_file, some_path
from compressed.files import check_outputs
from training import teachers

NETWORK = "mobilenet_v2:KaistMobileNetV2"


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("file", type=some_path, help="a .t7 file of KAIST AI: a path, or a name to download it by")
    parser.add_argument("--out", type=some_file, required=True, metavar="F.pt", help="what is written")
    args = parser.parse_args(argv)
    path = teachers.located(args.file)
    check_outputs([args.out], [path], suffix=".pt")
    state = kaist.folded(kaist.load_micronet(path))
    network = networks.fill(networks.make(NETWORK), state, f"{path} does not fit {NETWORK}")
    networks.save_state(network.state_dict(), args.out)
    weights = counting.weight_summary(network)["all"]
    print(f"wrote {args.out}: {weights['total']:,} weights, {weights['sparsity']:.1%} of them zero; read it with "
          f"--network {NETWORK}")
    return 0


if __name__ == "__main__":
    run_script(main)
