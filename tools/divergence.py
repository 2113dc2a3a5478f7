"""Compare checkpoints by their Kullback-Leibler divergence from teachers on newly augmented and mixed train images.

    python -m tools.divergence --teacher F [F ...] -- CHECKPOINT [CHECKPOINT ...]

Use it to choose between networks that were trained on all train images: there is no hold-out then, and the test set
must not be used to choose. The train images are cropped, flipped and mixed (mixup or CutMix) with new random
parameters, so no network was trained on exactly these inputs. Distillation minimizes this divergence; it does not
measure the accuracy on new photographs. A checkpoint with a claim is evaluated as quantized, any other in float32.
--network is that of the checkpoints; teachers are read as it, too, or else as the default network.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from compressed import checkpoints, cifar100, claims, datasets, networks, threads
from compressed.command_line import command_line, number, run_script, some_path
from compressed.errors import BadInput
from compressed.evaluation import in_batches
from compressed.exact_network import exact_network
from compressed.graph import prepare_if_possible
from training import augmentation, teachers


def mixed_images(data: cifar100.Images, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return `count` normalised images, float32 [count, 3, 32, 32], each cropped, flipped and mixed with another."""
    index = torch.randperm(len(data), generator=generator)[:count]
    draws = augmentation.draw(len(index), generator, mixing="both")
    return augmentation.augment(data.images[index], data.labels[index], draws)[0]


def read(path, network: str | None):
    """Return the network of a checkpoint: quantized if there is a claim, else in float32. network: specification."""
    if path.suffix != ".mnet" and not claims.claim_path(path).exists():
        return prepare_if_possible(networks.load_checkpoint(path, network or networks.DEFAULT))
    model, claim = checkpoints.load(path, network=network)
    return exact_network(model, claim["activations"])


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=some_path, metavar="CHECKPOINT")
    parser.add_argument("--teacher", nargs="+", type=some_path, metavar="F", default=list(map(Path, teachers.KAIST)),
                        help="teachers, as for training/main.py (default: KAIST AI's four)")
    parser.add_argument("--images", type=number(int, 2, 10**6), default=3000, metavar="N",
                        help="number of images (%(default)s)")
    parser.add_argument("--seed", type=number(int, 0, 2**62), default=12345, help="random seed (%(default)s)")
    networks.add_option(parser, "the claim")
    datasets.add_options(parser)
    args = parser.parse_args(argv)
    threads.prepare()
    models = {path: read(path, args.network) for path in args.checkpoints}
    data = datasets.chosen(args, "train")[0]
    taught_by = [teachers.load(path, args.network, data.data_set) for path in args.teacher]
    mixed = mixed_images(data, args.images, torch.Generator().manual_seed(args.seed))
    expected = sum(in_batches(teacher, mixed, 16).double().softmax(1) for teacher in taught_by) / len(taught_by)
    print(f"Kullback-Leibler divergence from the mean of {len(taught_by)} teacher(s), on {len(mixed):,} mixed images:")
    for path, model in models.items():
        found = in_batches(model, mixed, 16).double().log_softmax(1)
        if found.shape != expected.shape:
            raise BadInput(f"{path} has {found.shape[1]} classes, and the teachers {expected.shape[1]}")
        apart = F.kl_div(found, expected, reduction="none").sum(1)
        print(f"{apart.mean():.4f} +- {apart.std() / len(apart) ** 0.5:.4f}, same prediction for "
              f"{(found.argmax(1) == expected.argmax(1)).double().mean():.2%}: {path}", flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
