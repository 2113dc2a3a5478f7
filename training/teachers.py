"""Load teachers for distillation: our own checkpoints, or KAIST AI's (ver2, the challenge's 3rd entry).

    python -m training.teachers [--data FOLDER]     downloads KAIST's four networks, checks them, prints their accuracy

KAIST's networks are from the repository Kthyeon/micronet_neurips_challenge, MIT licence (Copyright (c) 2019 Kthyeon).
They were trained on CIFAR-100's train set only, so a network that is distilled from them has seen no other images. But
their authors chose the epoch by test accuracy, and a result that is distilled from them has to say so. The files are
searched in --folder, then in the environment variable TEACHERS_DIR, then in ./data.teachers. If the first two are not
given, they are downloaded to the last.

A teacher takes the same images as the student, normalised by cifar100.normalise, always of 32x32 pixels.
"""
import http.client
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compressed import cifar100, environment, networks, threads
from compressed.command_line import command_line, run_script, some_path
from compressed.errors import BadInput
from compressed.evaluation import logits
from compressed.files import sha256
from compressed.networks import is_plain, load_state

FOLDER = Path("data.teachers")
COMMIT = "fb41bbb"
URL = f"https://raw.githubusercontent.com/Kthyeon/micronet_neurips_challenge/{COMMIT}/Checkpoint_ver2/"
# file: SHA-256, and how many of the 10,000 test images are right in float32
KAIST = {
    "micronet_v2_pr_15.t7": ("94e62f31454e878f30cd1452e1b5c289712d0e03d44159ae63fe914f28c192b8", 8091),
    "micronet_v2_pr_30.t7": ("8fd49c2eb657f59ca5a6beae81492108269f55eb65f1bf5c70fe5204f6ca855e", 8108),
    "micronet_v2_pr_45.t7": ("11e8aa8aec8f30da327f5690fe63ef0878ea428ad0c284159fbfa6d470e18577", 8080),
    "micronet_v2_pr_60.t7": ("c578f599a064319ea704d592e926947276bd46c71083136afb71d36d3424114c", 8004)}
MEAN_OF_ALL = 8188  # correct predictions of the mean of all four networks' softmax

# (output channels, number of blocks, stride of the first block)
STAGES = ((20, 2, 1), (36, 1, 2), (36, 1, 1), (56, 3, 1), (80, 1, 2), (80, 4, 1), (88, 1, 2), (96, 2, 1), (114, 1, 1))
STEM_WIDTH, EXPANSION = 32, 2.5
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of RGB / 255, as in KAIST's training


def swish(x: Tensor) -> Tensor:
    """Return hard swish of x, computed in place unless gradients are recorded, because teachers run at every step."""
    return F.hardswish(x, inplace=not torch.is_grad_enabled())


class Block(nn.Module):
    """Inverted residual with hard swish; with stride 1 also squeeze-and-excitation and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        hidden = int(EXPANSION * in_channels)
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        # stored in the files for all blocks, but used only with stride 1
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
    """KAIST's network: images [N, 3, 32, 32], normalised by cifar100.normalise -> logits [N, 100]."""

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
    """Return KAIST's network from one of its files, in eval mode.

    A pruned layer is stored as `weight` and `mask`, and its weight is their product. Raises BadInput if the file is
    missing, damaged, or of another network.
    """
    state = load_state(path)
    for key in [key for key in state if key.endswith(".mask")]:
        mask, weight = state.pop(key), key.removesuffix("mask") + "weight"
        fits = weight in state and is_plain(mask) and is_plain(state[weight]) and state[weight].shape == mask.shape
        if not fits:
            raise BadInput(f"{path}: {key} belongs to no weight of its shape")
        state[weight] = state[weight] * mask
    return networks.fill(Micronet(), state, f"{path} is none of KAIST's networks")


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it, in place; return the model. Only for evaluation."""
    for module in list(model.modules()):
        names = [name for name, _ in module.named_children()]
        for conv_name, bn_name in zip(names, names[1:]):
            conv, bn = getattr(module, conv_name), getattr(module, bn_name)
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(module, bn_name, nn.Identity())
    return model


def load(path, network: str | None = None) -> nn.Module:
    """Return the teacher in a checkpoint file, in eval mode, with its BatchNorms folded.

    A file with a name from KAIST or the suffix .t7 is one of KAIST's networks; if it is not there, `find` looks for it.
    Any other is read as the network of this specification and, if it does not fit, as the default network.
    """
    path = Path(path)
    if path.name in KAIST and not path.is_file():
        path = find() / path.name
    if path.name in KAIST and sha256(path) != KAIST[path.name][0]:
        raise BadInput(f"{path}: its SHA-256 is not the published file's: damaged, or another network")
    theirs = path.suffix == ".t7"
    return fold_batchnorm(load_micronet(path) if theirs else ours(path, network)).requires_grad_(False)


def ours(path, network: str | None) -> nn.Module:
    """Return the network of a checkpoint: the specified one or, if keys or shapes do not fit, the default one."""
    try:
        return networks.load_checkpoint(path, network or networks.DEFAULT)
    except BadInput:
        if network in (None, networks.DEFAULT):
            raise
        try:
            return networks.load_checkpoint(path, networks.DEFAULT)
        except BadInput as error:
            raise BadInput(f"{error}; it is no network of {network} either") from error


# ---------------------------------------------------------------------------------------------- find and download

def find(folder=None) -> Path:
    """Return the folder of KAIST's four files: `folder`, else TEACHERS_DIR, else ./data.teachers.

    Files that ./data.teachers lacks are downloaded. Raises BadInput if one of the first two is given and lacks a file,
    if a download fails, or if a file is not the published one.
    """
    given = folder or environment.folder("TEACHERS_DIR")
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
        raise BadInput(f"{', '.join(wrong)}: the accuracy differs from the expected one")
    return 0


if __name__ == "__main__":
    run_script(main)
