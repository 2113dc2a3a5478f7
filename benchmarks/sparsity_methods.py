"""Compare pruning methods by their hold-out accuracy after equal training.

    python -m benchmarks.sparsity_methods --json benchmarks/sparsity_methods.json     resumes if it was stopped

For each seed one dense network is trained. From it, for each method and target, a second stage makes zeros, and a third
one retrains under the mask. All methods see the same images in the same order:

    proximal    reweighted L1 as a soft threshold after every step, lambda by feedback towards the target
    plain       the same with --eps 1000, so that alpha is nearly the same for all weights: L1 without reweighting
    loss-L      reweighted L1 added to the loss, with a fixed lambda L. The first seed tries every L of --lambda; the
                other seeds train only the best one for each target. It is chosen by the hold-out that is reported,
                which is in favor of this method: nothing is chosen for the others. With 1e-3 the network stayed at
                chance (that run was not kept)
    magnitude   a variant of gradual magnitude pruning (Zhu and Gupta 2017; training/METHOD.md)
    one-shot    the second stage trains densely, and the mask prunes all the smallest weights at once
    dense       as one-shot, without a mask: what the same training reaches without zeros. Its target is 0

For every method but dense the mask prunes the target share of smallest weights, by one threshold for all layers but the
stem (more, if the second stage made more zeros). Differences between the methods remain:

- Updates: 20 of alpha, 100 of magnitude's zeros. Proximal is at its target after three quarters of the summed learning
  rate, magnitude at its end.
- Length of a step: a step of Muon rotates a convolution by a given angle. With magnitude it moves the weights that are
  left. With proximal and the penalty in the loss it moves all weights, zeros and nearly-zeros, too; so those that
  matter move less: at 90% zeros, by estimate, a third as far.
- Penalty in the loss: for what Muon updates, lambda is how much of each step serves the penalty instead of the loss.
- Norms: Muon keeps those of its convolutions, and masks lower them afterwards; only proximal and plain
  restore those of depthwise convolutions, and plain L1 may shrink the linear layer, whose norm nothing restores.
- Between layers: Muon's norms are those of the initialization, and one threshold for all layers depends on them. Layers
  may lose nearly all of their weights by that, above all with one-shot ("fewest_kept" in the results).

Training uses 45,000 images and 5,000 are held out; the accuracy is that of the last epoch's weight average. A batch is
divided among two workers on any CPU, and not on a GPU: results or a run folder with other options, on the other kind of
device or in another precision too, are refused. Results that are lost are made again from the run folders.

By default that is at most 68 stages of 414 epochs in all: eight hours on two free CPU cores.
"""
import argparse
import functools
import itertools
import math
import time
from pathlib import Path

import torch

from compressed import datasets
from compressed.cifar100 import Images
from compressed.command_line import command_line, number, run_script, some_path, some_text
from compressed.errors import BadInput
from compressed.files import load_json, load_record, save_json
from compressed.networks import load_checkpoint
from compressed.threads import stop_noted
from tools import tables
from training import main as training
from training import masks, plan, sparsity
from training.runs import load_lines

METHODS = ("proximal", "plain", "loss", "magnitude", "one-shot", "dense")
COMMON = ("--optimizer muon --augment plain --mixing both --schedule cosine --warmup-epochs 0.5 "
          "--clean 0 --eval-every 0 --refresh 5000").split()
UPDATES = "20"  # of alpha
NEAR_ZERO = 1e-4  # the submission's threshold


def parse(argv=None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--json", type=some_path, required=True, metavar="F", help="results; added to if it is there")
    parser.add_argument("--runs", type=some_path, default=Path("runs/sparsity_methods"), metavar="DIR",
                        help="run folders (%(default)s)")
    parser.add_argument("--network", type=some_text, default="mobilenet_v2:MobileNetV2?width=0.5", metavar="SPEC",
                        help="(%(default)s)")
    parser.add_argument("--epochs", nargs=3, type=number(int, 1, 10**4), default=(8, 6, 6), metavar="E",
                        help="dense, making zeros, masked (8 6 6)")
    parser.add_argument("--batch-size", type=number(int, 1, 10**6), default=128, metavar="B", help="(%(default)s)")
    parser.add_argument("--sizes", default="24:0.97,32", metavar="S", help="as in training/main.py (%(default)s)")
    parser.add_argument("--targets", nargs="+", type=number(float, 0.001, 0.999), default=(0.8, 0.9), metavar="S",
                        help="shares of zeros (0.8 0.9)")
    parser.add_argument("--seeds", type=number(int, 1, 100), default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="(all)")
    parser.add_argument("--lambda", dest="lam", nargs="+", type=number(float, 0, 10**6), default=(1e-6, 1e-5, 1e-4),
                        metavar="L", help="of the penalty in the loss, each a method of its own (1e-6 1e-5 1e-4)")
    parser.add_argument("--max-minutes", type=number(float, 0, 10**6), metavar="M", help="stop after that time")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even if there is a CUDA device")
    datasets.add_options(parser)
    args = parser.parse_args(argv)
    args.holdout = not args.made_up
    args.workers = 1 if torch.cuda.is_available() and not args.no_cuda else 2
    args.methods = [each for method in args.methods
                    for each in ([f"loss-{lam:g}" for lam in args.lam] if method == "loss" else [method])]
    return args


def options_of(method: str, target: float) -> list[str]:
    """Return the second stage's options of training/main.py."""
    if method.startswith("loss-"):
        return ["--rew", "--penalty", "loss", "--lambda", method.removeprefix("loss-"), "--updates", UPDATES]
    led = ["--rew", "--penalty", "proximal", "--target-sparsity", str(target), "--updates", UPDATES]
    return {"proximal": led, "plain": [*led, "--eps", "1000"],
            "magnitude": ["--rew", "--penalty", "magnitude", "--target-sparsity", str(target)],
            "one-shot": ["--rew", "--penalty", "proximal", "--lambda", "0"],
            "dense": ["--rew", "--penalty", "proximal", "--lambda", "0"]}[method]


def is_left_out(method: str, target: float, seed: int, rows: list[dict]) -> bool:
    """Return whether the method is a penalty in the loss whose lambda was not the first seed's best."""
    if seed == 0 or not method.startswith("loss-"):
        return False
    tried = [row for row in rows if row["seed"] == 0 and row["target"] == target and row["method"].startswith("loss-")]
    return method != max(tried, key=lambda row: row["accuracy"])["method"]


class Runs:
    """The stages of all runs, each trained once. Raises BadInput, resumable, when the time is up."""

    def __init__(self, args):
        self.args, self.started = args, time.monotonic()
        self.common = [*COMMON, "--network", args.network, "--sizes", args.sizes,
                       "--batch-size", str(args.batch_size), "--workers", str(args.workers),
                       *["--no-cuda"] * args.no_cuda, *datasets.option_words(args)]

    @functools.cached_property
    def held_out(self) -> Images:
        return datasets.chosen(self.args, "test")[0]

    def train(self, stage: str, folder: Path, epochs: int, *options: str) -> Path:
        """Train a stage unless it is there; return its weights. Raises BadInput if it was made with other options."""
        words = [*self.common, "--run", str(folder), "--epochs", str(epochs), *options]
        weights = folder / f"{stage}.pt"
        if weights.is_file():  # training/main.py compares its options, but not the workers
            workers = load_record(weights.with_suffix(".options.json"), "remove the run folder")["settings"]["workers"]
            if workers != self.args.workers:
                raise BadInput(f"{weights} was trained by {workers} workers, and not by {self.args.workers}: give "
                               "another folder for --runs")
        if self.args.max_minutes is not None:
            left = self.args.max_minutes - (time.monotonic() - self.started) / 60
            words += ["--max-minutes", str(max(0.0, left))]
        with stop_noted() as asked:  # a signal during a stage's last step ends the script, too
            training.main(words)
        if asked or not weights.is_file():
            raise BadInput("stopped; the same command resumes it")
        return weights

    def pruned(self, checkpoint: Path) -> list[torch.Tensor]:
        """Return the weights of each pruned layer in a checkpoint, flat."""
        model = load_checkpoint(checkpoint, self.args.network, self.held_out.data_set.classes)
        layers = sparsity.pruned_layers(argparse.Namespace(config_file=None, sparsity_type="irregular"), model)
        return [weight.flatten() for weight in masks.weights_of(model, layers).values()]

    def measure(self, method: str, target: float, seed: int) -> dict:
        """Return a row of the results.

        accuracy_dense, _made, accuracy: on the hold-out, after each of the three stages. zeros_made, zeros: after the
        last two. near_zero: share of the pruned layers' weights below NEAR_ZERO before the mask. fewest_kept: share of
        the weights that the mask leaves in the layer where it is least.
        """
        folder = self.args.runs / f"seed-{seed}"
        own = folder / f"{method}-{target:g}"
        dense = self.train("pretrain", folder, self.args.epochs[0], "--pretrain", "--turn", "0.01", "--lr", "0.1",
                           "--seed", str(seed))
        # what does not depend on the target is trained once
        second = own if method in ("proximal", "plain", "magnitude") else folder / method.replace("dense", "one-shot")
        made = self.train("rew", second, self.args.epochs[1], *options_of(method, target), "--start",
                          str(dense), "--turn", "0.01", "--lr", "0.1", "--seed", str(seed))
        chosen = ["--target-sparsity", str(target), "--sparsity-type", "irregular"] if target else [
            "--sparsity-type", "threshold", "--threshold", "0"]  # a mask that prunes nothing
        masked = self.train("masked", own, self.args.epochs[2], "--masked-retrain", "--start", str(made), *chosen,
                            "--turn", "0.008", "--lr", "0.1", "--seed", str(seed))
        pretrain, rew, last = (load_lines(path.with_suffix(".jsonl"))[-1] for path in (dense, made, masked))
        record = load_record(masked.with_suffix(".options.json"), "remove the run folder")
        return {"method": method, "target": target, "seed": seed, "accuracy": last["test_accuracy"],
                "images": len(self.held_out), "accuracy_dense": pretrain["test_accuracy"],
                "accuracy_made": rew["test_accuracy"], "zeros": last["zeros"], "zeros_made": rew["zeros"],
                "near_zero": float((torch.cat(self.pruned(made)).abs() < NEAR_ZERO).double().mean()),
                "fewest_kept": min(float((weights != 0).double().mean()) for weights in self.pruned(masked)),
                "machine": record["machine"], "commit": record["commit"]}


def main(argv=None) -> int:
    args = parse(argv)
    about = {"network": args.network, "epochs": list(args.epochs), "batch_size": args.batch_size,
             "sizes": args.sizes, "common": COMMON, "updates": UPDATES, "workers": args.workers,
             "precision": plan.precision("auto", args.workers == 1), "made_up": args.made_up}
    runs = Runs(args)
    about["data"] = runs.held_out.data_set.digest
    results = load_json(args.json) if args.json.is_file() else {"about": about, "rows": []}
    if results.get("about") != about:
        raise BadInput(f"{args.json} holds results of other options ({results.get('about')}); give another file")
    save_json(results, args.json)  # before the first row, too: so that the stages go on with the same options
    done = {(row["method"], row["target"], row["seed"]) for row in results["rows"]}
    pairs = [(target, method) for target in args.targets for method in args.methods if method != "dense"]
    pairs += [(0.0, "dense")] * ("dense" in args.methods)
    for seed, (target, method) in itertools.product(range(args.seeds), pairs):
        if (method, target, seed) in done or is_left_out(method, target, seed, results["rows"]):
            continue
        row = runs.measure(method, target, seed)
        results["rows"].append(row)
        save_json(results, args.json)
        print(f"seed {seed}, {target:.0%} zeros, {method}: {row['accuracy']:.2%} of the hold-out", flush=True)
    for target, found in tables.by_seed(results["rows"]).items():
        for method, accuracies in found.items():
            beside = tables.differences(accuracies, found.get("one-shot", {})) if method != "one-shot" else ""
            print(f"{target:.0%} zeros, {method}: {tables.mean_of(accuracies)}"
                  + f"; minus one-shot, by seed: {beside} points" * bool(beside))
    images = len(runs.held_out)
    error = max(100 * math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / images) for row in results["rows"])
    print(f"± is the standard deviation over seeds (their number in brackets). All are measured on the same {images:,} "
          f"images; the standard error from the choice of these images, up to {error:.1f} points, is not in it")
    return 0


if __name__ == "__main__":
    run_script(main)
