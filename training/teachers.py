"""Networks to distil from: our own checkpoints, and those that KAIST AI published (the challenge's 2nd and 3rd place).

    python -m training.teachers [--data FOLDER]     downloads KAIST's four networks, checks them, prints their accuracy

Repository Kthyeon/micronet_neurips_challenge, MIT licence (Copyright (c) 2019 Kthyeon). They were trained on
CIFAR-100's train set alone, so what is distilled from them still is. Their authors chose the epoch by test accuracy; a
result that is distilled from them has to say so. The files are looked for in --folder, then in the environment variable
TEACHERS_DIR, then in ./data.teachers, and downloaded to the last.

A teacher takes the images that the student sees, normalised as cifar100.normalise does and of 32x32 pixels.
"""
import http.client
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compressed import cifar100, counting, networks, threads
from compressed.command_line import command_line, run_script, some_path
from compressed.errors import BadInput
from compressed.evaluation import logits
from compressed.files import sha256
from compressed.graph import trace, weight_layers
from compressed.networks import is_plain, load_state

FOLDER = Path("data.teachers")
COMMIT = "fb41bbb"
URL = f"https://raw.githubusercontent.com/Kthyeon/micronet_neurips_challenge/{COMMIT}/Checkpoint_ver2/"
# file: SHA-256, and how many of the 10,000 test images are right in float32
KAIST = {
    "micronet_v2_pr_15.t7": ("94e62f31454e878f30cd1452e1b5c289712d0e03d44159ae63fe914f28c192b8", 8088),
    "micronet_v2_pr_30.t7": ("8fd49c2eb657f59ca5a6beae81492108269f55eb65f1bf5c70fe5204f6ca855e", 8104),
    "micronet_v2_pr_45.t7": ("11e8aa8aec8f30da327f5690fe63ef0878ea428ad0c284159fbfa6d470e18577", 8081),
    "micronet_v2_pr_60.t7": ("c578f599a064319ea704d592e926947276bd46c71083136afb71d36d3424114c", 8000)}
MEAN_OF_ALL = 8187  # the mean of the softmax of all four

# output width, number of blocks, stride of the first
STAGES = ((20, 2, 1), (36, 1, 2), (36, 1, 1), (56, 3, 1), (80, 1, 2), (80, 4, 1), (88, 1, 2), (96, 2, 1), (114, 1, 1))
STEM_WIDTH, EXPANSION = 32, 2.5
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of RGB / 255


def swish(x: Tensor) -> Tensor:
    """Hard swish, in place where nobody asks for a gradient: a teacher is evaluated at every step of its student."""
    return F.hardswish(x, inplace=not torch.is_grad_enabled())


class Block(nn.Module):
    """Inverted residual with hard swish and, where the stride is 1, squeeze and excitation and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        hidden = int(EXPANSION * in_channels)
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        # stored with stride 2 too, but used with stride 1 alone
        self.fc1 = nn.Conv2d(out_channels, out_channels // 4, 1)
        self.fc2 = nn.Conv2d(out_channels // 4, out_channels, 1)
        self.residual = stride == 1
        self.shortcut = nn.Sequential()
        if self.residual and in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False),
                                          nn.BatchNorm2d(out_channels))

    def forward(self, x):
        out = swish(self.bn1(self.conv1(x)))
        out = swish(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if not self.residual:
            return out
        excited = self.fc2(swish(self.fc1(out.mean((2, 3), keepdim=True)))).sigmoid()
        return out * excited + self.shortcut(x)


class Micronet(nn.Module):
    """KAIST's network: [N, 3, 32, 32] images as cifar100.normalise makes them -> [N, 100] logits."""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        blocks, channels = [], STEM_WIDTH
        for width, repeats, stride in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, width, stride if i == 0 else 1))
                channels = width
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)
        # from (pixel - 128) / 64 to (pixel / 255 - mean) / deviation
        scale = torch.tensor([cifar100.STD / 255 / s for s in STD])
        shift = torch.tensor([(cifar100.MEAN / 255 - m) / s for m, s in zip(MEAN, STD)])
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    def forward(self, x):
        out = swish(self.bn1(self.conv1(x * self.scale + self.shift)))
        return self.linear(self.layers(out).mean((2, 3)))


def load_micronet(path) -> Micronet:
    """KAIST's network from one of its files, in eval mode: the weight of a pruned layer is `weight` times `mask`.

    Raises BadInput if the file is missing, damaged, or of another network.
    """
    state = load_state(path)
    for key in [key for key in state if key.endswith(".mask")]:
        mask, weight = state.pop(key), key.removesuffix("mask") + "weight"
        fits = weight in state and is_plain(mask) and is_plain(state[weight]) and state[weight].shape == mask.shape
        if not fits:
            raise BadInput(f"{path}: {key} belongs to no weight of its shape")
        state[weight] = state[weight] * mask
    model = Micronet()
    odd = [key for key, value in state.items() if not is_plain(value) or not value.float().isfinite().all()]
    if odd:
        raise BadInput(f"{path}: {odd[0]} is no dense tensor of finite numbers")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(f"{path} is none of KAIST's networks ({' '.join(str(error).split())[:200]})") from error
    return model.eval()


def authors_count(model: Micronet) -> dict[str, float]:
    """Return {"parameters", "operations", "score"} of a published network as its authors count it, in 32-bit units.

    Everything that is stored has 16 bits, and every weight a mask bit; a BatchNorm is a bias alone. Multiplications
    have 16 bits, additions 32. Hard swish is 4 multiplications and an addition, and neither the scaling by squeeze and
    excitation nor a residual addition counts. They publish 0.0056215; the same digits but for the last two come of
    this list, which counts what runs: their own counts the squeeze and excitation of strided blocks, too, which never
    runs.
    """
    weights = [module.weight for _, module in weight_layers(model)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    biases = [module.bias for _, module in weight_layers(model) if module.bias is not None] + [n.bias for n in norms]
    parameters = sum(int(w.count_nonzero()) / 2 + w.numel() / 32 for w in weights) + sum(map(len, biases)) / 2
    multiplications = additions = 0
    for op in trace(model):
        if op.kind in ("conv", "linear"):
            terms, positions = op.module.weight.flatten(1).count_nonzero(1), op.outputs // op.channels
            multiplications += int(terms.sum()) * positions
            additions += int((terms - 1).clamp(min=0).sum()) * positions + op.outputs  # and a bias
        elif op.kind == "hardswish":
            multiplications, additions = multiplications + 4 * op.outputs, additions + op.outputs
        elif op.kind == "sigmoid":
            multiplications += op.outputs
        elif op.kind == "mean":
            multiplications, additions = multiplications + op.outputs, additions + (op.fan_in - 1) * op.outputs
    operations = multiplications / 2 + additions
    return {"parameters": parameters, "operations": operations,
            "score": parameters / counting.STORAGE_BASE + operations / counting.OPERATIONS_BASE}


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it, in place: a network that is only evaluated needs none."""
    for module in list(model.modules()):
        names = [name for name, _ in module.named_children()]
        for conv_name, bn_name in zip(names, names[1:]):
            conv, bn = getattr(module, conv_name), getattr(module, bn_name)
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(module, bn_name, nn.Identity())
    return model


def load(path, network: str | None = None) -> nn.Module:
    """The teacher in a checkpoint file, in eval mode, its BatchNorms folded.

    It is one of KAIST's networks by its name or suffix, else one of this specification, else of the default one.
    """
    path = Path(path)
    if path.name in KAIST and not path.is_file():
        path = find() / path.name
    if path.name in KAIST and sha256(path) != KAIST[path.name][0]:
        raise BadInput(f"{path}: its SHA-256 is not the published file's: damaged, or another network")
    theirs = path.suffix == ".t7"
    return fold_batchnorm(load_micronet(path) if theirs else ours(path, network)).requires_grad_(False)


def ours(path, network: str | None) -> nn.Module:
    """The checkpoint's network: keys and shapes tell whether it is this one or the default one."""
    try:
        return networks.load_checkpoint(path, network or networks.DEFAULT)
    except BadInput:
        if network in (None, networks.DEFAULT):
            raise
        try:
            return networks.load_checkpoint(path, networks.DEFAULT)
        except BadInput as error:
            raise BadInput(f"{error}; nor is it a network of {network}") from error


# ---------------------------------------------------------------------------------------------- find and download

def find(folder=None) -> Path:
    """The folder of KAIST's four files: `folder`, else TEACHERS_DIR, else ./data.teachers, downloaded if missing.

    Raises BadInput if a folder that was given lacks one, or if the download fails or brings something else.
    """
    given = folder or os.environ.get("TEACHERS_DIR")
    start = Path(given or FOLDER)
    for name, (digest, _) in KAIST.items():
        if not (start / name).is_file():
            if given:
                raise BadInput(f"{start} ({'--folder' if folder else 'TEACHERS_DIR'}) holds no {name}")
            start.mkdir(exist_ok=True)
            part = start / f"{name}.part"
            try:
                cifar100.fetch(URL + name, part, name)
            except (OSError, http.client.HTTPException) as error:
                raise BadInput(f"cannot download {URL + name} ({error}); point at a local folder with "
                               "TEACHERS_DIR") from error
            os.replace(part, start / name)
        if sha256(start / name) != digest:
            raise BadInput(f"{start / name}: its SHA-256 is not the published file's: damaged, or another network")
    return start


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--folder", type=some_path, metavar="DIR",
                        help="folder with the four files (default: $TEACHERS_DIR, else a download)")
    cifar100.add_options(parser, made_up=False)
    args = parser.parse_args(argv)
    threads.prepare()
    folder = find(args.folder)
    test = cifar100.load(args.data, "test")
    total, wrong = 0, []
    for name, (_, published) in KAIST.items():
        probabilities = logits(load(folder / name).to(memory_format=torch.channels_last), test.images).softmax(1)
        correct = int((probabilities.argmax(1) == test.labels).sum())
        total = total + probabilities
        print(f"{name}: {correct:,} of {len(test):,} (expected {published:,})", flush=True)
        wrong += [name] * (abs(correct - published) > 5)
    correct = int((total.argmax(1) == test.labels).sum())
    print(f"mean of all four: {correct:,} of {len(test):,} (expected {MEAN_OF_ALL:,})")
    if wrong:
        raise BadInput(f"{', '.join(wrong)}: not the accuracy that was measured before")
    return 0


if __name__ == "__main__":
    run_script(main)
