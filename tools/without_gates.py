"""KAIST AI's published network without squeeze and excitation, as a checkpoint that quantize.py can fine-tune.

    python -m tools.without_gates micronet_v2_pr_60.t7 --out runs/kaist.pt
    python quantize.py --checkpoint runs/kaist.pt --network mobilenet_v2:KaistMobileNetV2 \\
        --table training/bits/small.toml --out runs/kaist-4bit.pt --epochs 40

What comes out is *KAIST AI's network, compressed further*: table, masks and most of the training are theirs (MIT
licence, Copyright (c) 2019 Kthyeon), and its authors chose the epoch by test accuracy.
"""
import torch

from compressed import datasets, kaist, networks
from compressed.command_line import command_line, number, run_script, some_path
from compressed.files import check_outputs
from compressed.graph import weight_layers
from training import teachers

NETWORK = "mobilenet_v2:KaistMobileNetV2"


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("file", type=some_path, help="one of KAIST's files, by path or by name")
    parser.add_argument("--out", type=some_path, required=True, metavar="F.pt", help="what is written")
    parser.add_argument("--calibration", type=number(int, 1, 10**6), default=2000, metavar="N",
                        help="train images over which the gates are averaged (%(default)s)")
    datasets.add_options(parser)
    args = parser.parse_args(argv)
    path = teachers.located(args.file)
    check_outputs([args.out], [path], suffix=".pt")
    model = kaist.load_micronet(path)
    images = datasets.chosen(args, "train")[0].images[:args.calibration]
    state = kaist.without_gates(model, images)
    network = networks.fill(networks.make(NETWORK), state, f"{path} does not fit {NETWORK}")
    networks.save_state(network.state_dict(), args.out)
    weights = torch.cat([layer.weight.flatten() for _, layer in weight_layers(network)])
    zeros = float((weights == 0).double().mean())
    print(f"wrote {args.out}: {len(weights):,} weights, {zeros:.1%} of them zero; gates averaged over {len(images):,} "
          f"train images; read it with --network {NETWORK}")
    return 0


if __name__ == "__main__":
    run_script(main)
