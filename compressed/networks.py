"""Make a network from a specification, and fill it with the values of a checkpoint file.

A specification is a module or a file, the name of a class or function in it, and arguments by name:

    mobilenet_v2:MobileNetV2                the submission's network, the default everywhere
    mobilenet_v2:MobileNetV2?width=0.5      arguments after "?", joined by "&", as Python literals
    my_net.py:MyNet?depth=20                a file of your own

The class or function is called with these arguments, and with `num_classes` if it has such a parameter. It must return
an nn.Module that maps float32 images [N, 3, 32, 32] to logits [N, classes].
"""
import ast
import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from compressed.cifar100 import CLASSES
from compressed.command_line import some_text
from compressed.errors import BadInput, brief, refused
from compressed.files import save_tensors, sha256

DEFAULT = "mobilenet_v2:MobileNetV2"
OWN = Path(__file__).resolve().parent.parent / "mobilenet_v2.py"
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16,
         torch.int32, torch.int64)


# ---- Specifications ------------------------------------------------------------------------------

CLAIM = "the checkpoint's claim"


def add_option(parser, source: str | None = None) -> None:
    """Add --network to a parser. source: what may say which network it is if the option is not given, such as CLAIM."""
    stated = f"default: as {source} says, else {DEFAULT}" if source else "%(default)s"
    parser.add_argument("--network", type=some_text, metavar="SPEC", default=None if source else DEFAULT,
                        help="FILE.py:NAME or MODULE:NAME, with arguments as in mobilenet_v2:MobileNetV2?width=0.5; it "
                             "is called with num_classes, if it has that argument, and must return an nn.Module that "
                             f"maps float images [N, 3, 32, 32] to logits [N, classes] ({stated})")


def parse(spec: str, option: str = "--network") -> tuple[str, str, dict]:
    """Return (file or module, name in it, {argument: value}) of a specification. option: where it was given.

    A value that is no Python literal is a string. Raises BadInput for anything but a specification.
    """
    if not spec.isprintable():
        raise BadInput(f"{option} {spec!a}: expected characters that can be printed")
    what, _, text = spec.partition("?")
    place, _, name = what.rpartition(":")
    if not place or not name.isidentifier():
        raise BadInput(f"{option} {spec}: expected FILE.py:NAME or MODULE:NAME, such as {DEFAULT}")
    arguments = {}
    for part in filter(None, text.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise BadInput(f"{option} {spec}: {part!r} is no argument, expected NAME=VALUE")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply
            arguments[key] = value
    return place, name, arguments


_digests: dict[Path, str] = {}  # of the imported .py files, as they were then


def _module(place: str):
    """Import a module by its name, or a .py file by its path; only the first time, whatever has changed since."""
    if place == OWN.stem and Path(getattr(importlib.util.find_spec(place), "origin", None) or "").resolve() != OWN:
        place = str(OWN)  # the user's folder has a file of that name
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end: none of their files can hide one of ours
    importlib.invalidate_caches()
    if path.is_file():
        _digests.setdefault(path, sha256(path)[:16])
    found = None
    with contextlib.suppress(ValueError):  # of a module that was not imported in the usual way
        found = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    if found and found.origin and Path(found.origin).resolve() == path:
        return importlib.import_module(path.stem)  # other files of the user import it so, and get the same classes
    found = importlib.util.spec_from_file_location(f"network_{path.stem}", path)
    module = sys.modules.get(found.name)
    if getattr(module, "__file__", None) != str(path):
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module  # dataclasses and pickle look their module up
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[found.name]
            raise
    return module


def source_digest(spec: str) -> str | None:
    """Return a digest of the file of a specification FILE.py:NAME, as this process has imported it.

    None for MODULE:NAME, and for a name alone. Files that this file imports do not count.
    """
    path = Path(parse(spec)[0]).resolve() if ":" in spec else Path()
    return _digests.get(path, sha256(path)[:16]) if path.suffix == ".py" and path.is_file() else None


def find(spec: str, option: str = "--network") -> tuple:
    """Return (class or function, {argument: value}) of a specification. option: where it was given, for messages.

    Raises BadInput for a specification that names nothing.
    """
    place, name, arguments = parse(spec, option)
    if place.endswith(".py") and not os.path.isfile(place):
        raise BadInput(f"{option} {spec}: there is no file {place}")
    with refused(f"{option} {spec}: {place} cannot be imported", errors=(Exception, SystemExit)):  # the user's own code
        found = getattr(_module(place), name, None)
    if not callable(found):
        raise BadInput(f"{option} {spec}: {place} has no class or function {name}")
    return found, arguments


def make(spec: str = DEFAULT, num_classes: int = CLASSES) -> nn.Module:
    """Return the network of a specification, in float32, with random weights from torch's global generator.

    num_classes is an argument of the network unless the specification states one. Raises BadInput for a specification
    that names nothing, and for one whose constructor fails.
    """
    constructor, arguments = find(spec)
    with refused(f"--network {spec} cannot be made", errors=(Exception, SystemExit)):  # whatever its constructor raises
        if "num_classes" in inspect.signature(constructor).parameters:
            arguments.setdefault("num_classes", num_classes)
        network = constructor(**arguments)
    if not isinstance(network, nn.Module):
        raise BadInput(f"--network {spec}: returns {type(network).__name__}, expected an nn.Module")
    if any(isinstance(each, UninitializedTensorMixin) for each in (*network.parameters(), *network.buffers())):
        raise BadInput(f"--network {spec}: has lazy modules, whose weights do not exist yet: give them their sizes")
    return network.float()


def width(spec: str) -> float | None:
    """Return the width multiplier of our MobileNetV2; None for any other network, or one with other arguments."""
    place, name, arguments = parse(spec)
    found = arguments.pop("width", 1.3)
    ours = f"{place}:{name}" == DEFAULT and not arguments and isinstance(found, (int, float)) and 0 < found <= 8
    return float(found) if ours else None


def same(spec: str, other: str) -> bool:
    """Return True if two specifications name the same network, with the same arguments, wherever its file is."""
    (place, *theirs), (own_place, *ours) = parse(spec), parse(other)
    return (os.path.basename(place) == os.path.basename(own_place) and theirs == ours
            or width(spec) is not None and width(spec) == width(other))


def followed(spec: str, given: str | None) -> str:
    """Return the specification to make a file's network from; spec: what the file states; given: the user's --network.

    Reading a file must not run code that it names: without --network only this repository's own is run. The user's file
    may be in another folder. Raises BadInput for other code without --network, and, naming both, if they differ.
    """
    if not spec.isprintable():
        raise BadInput("the specification of its network holds characters that cannot be printed")
    if given is None:
        if not re.fullmatch(r"mobilenet_v2:[A-Z]\w*(\?.*)?", spec):
            raise BadInput(f"it is of the network {spec}: to run that code, say --network {shlex.quote(spec)} "
                           "(in Python: network=...)")
        return spec
    if not same(spec, given):
        raise BadInput(f"it is of the network {spec}, and not of {given}")
    return given


# ---- Checkpoint files ----------------------------------------------------------------------------

WRAPPERS = ("state_dict", "model_state_dict", "net", "model")  # {"net": the state dict, "acc": ..., "epoch": ...}
COUNTERS = ("total_ops", "total_params", "n_averaged")  # what thop and AveragedModel leave; no part of a network


def load_state(path, own: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint file, on the CPU.

    It leaves out wrappers such as {"net": ..., "epoch": ...}, the prefixes of DataParallel, AveragedModel and
    torch.compile (`module.`, `_orig_mod.`), and the counters of thop and AveragedModel, but keeps the keys in `own`, of
    a network that has such names itself. It executes nothing in the file (`weights_only=True`). Raises BadInput if the
    file is missing or damaged, or holds no plain state dict.
    """
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such checkpoint file; give another one or train one with `python training/main.py`")
    with open(path, "rb") as file:  # opened here: torch accepts only UTF-8 names
        try:
            if zipfile.is_zipfile(file) and (part := zipfile.ZipFile(file).testzip()):
                raise zipfile.BadZipFile(f"{part} has another checksum")  # torch does not look at them
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes torch's reader stumble anywhere: IndexError, struct.error
            # not torch's message: it advises weights_only=False, which executes code in the file
            raise BadInput(f"{path}: not a checkpoint that torch can read as plain tensors: it is damaged, or holds "
                           f"something else, such as a whole model ({type(error).__name__})") from error
    if isinstance(state, dict):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                              for key, value in state.items()):
        raise BadInput(f"{path}: not a plain state dict of tensors; save `model.state_dict()` and nothing around it")
    plain = {}
    for key, value in state.items():
        name = bare(key, own)
        if name not in own and name.rpartition(".")[2] in COUNTERS:
            continue
        if name in plain:
            raise BadInput(f"{path}: holds the same key with and without the prefix 'module.' ({name})")
        plain[name] = value
    return plain


def bare(key: str, own) -> str:
    """Return a key without the names that wrappers put in it, removed one by one until it is one of `own`."""
    while key not in own:
        shorter = key.replace("_orig_mod.", "", 1) if "_orig_mod." in key else key.removeprefix("module.")
        if shorter == key:
            break
        key = shorter
    return key


def save_state(state: dict[str, torch.Tensor], path) -> str:
    """Write a state dict, of any device, as a checkpoint file (see `files.save_tensors`); return its SHA-256.

    Raises BadInput, and keeps the file that is there, for values that `load_checkpoint` would refuse.
    """
    problems = [f"{key} {problem}" for key, value in state.items() if (problem := fault(key, value))]
    if problems:
        raise BadInput(f"{path}: not written: {brief(problems)}")
    return save_tensors({key: value.detach().cpu().contiguous() for key, value in state.items()}, path)


def half_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict on the CPU in float16, but in float32 every tensor that float16 would damage.

    A tensor is damaged if a value moves by more than 2^-11 (half of float16's last place) of the largest value in its
    row: the weights of an output channel or, in a vector, the value alone. So a BatchNorm variance above 65,504, or one
    far below 2^-14, stays as it is.
    """
    halved = {}
    for key, value in state.items():
        halved[key] = value = value.detach().cpu().contiguous()
        rows = value.double().flatten(1) if value.dim() > 1 else value.double().reshape(-1, 1)
        off = (value.half().double().reshape(rows.shape) - rows).abs()
        if value.is_floating_point() and (off <= 2.0**-11 * rows.abs().amax(1, keepdim=True)).all():
            halved[key] = value.half()
    return halved


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is dense, of real numbers that become float32 as they are: not nested or quantized."""
    return not tensor.is_nested and not tensor.is_meta and tensor.layout is torch.strided and tensor.dtype in PLAIN


def fault(key: str, value: torch.Tensor) -> str | None:
    """Return why a tensor cannot be part of a network, or None; the same for reading and for writing."""
    if not isinstance(value, torch.Tensor) or not is_plain(value):
        return "is no dense tensor of real numbers"
    if not torch.isfinite(value.float()).all():
        return "holds values that are not finite" + " in float32" * (value.dtype == torch.float64)
    if key.endswith("running_var") and (value < 0).any():
        return "holds a variance below zero"
    return None


def fill(model: nn.Module, state: dict[str, torch.Tensor], misfit: str) -> nn.Module:
    """Load a state dict into a model, in place; return it in eval mode.

    Raises BadInput, with `misfit` and three of the problems, for keys that are unknown, missing or misshapen, and for
    tensors that no network can have (see `fault`). `num_batches_tracked` may be missing (it is not used).
    """
    wanted = model.state_dict()
    problems = [f"unknown {key}" for key in state if key not in wanted]
    for key, value in wanted.items():
        if key not in state:
            if not key.endswith("num_batches_tracked"):
                problems.append(f"missing {key}")
        elif is_plain(state[key]) and state[key].shape != value.shape:
            problems.append(f"{key} is {list(state[key].shape)}, expected {list(value.shape)}")
        elif problem := fault(key, state[key]):
            problems.append(f"{key} {problem}")
    if problems:
        raise BadInput(f"{misfit}: {brief(problems)}")
    model.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})
    return model.eval()


def load_checkpoint(path, network: str = DEFAULT, num_classes: int | None = None, hint: bool = True) -> nn.Module:
    """Return the network of a specification with the values of a checkpoint file, in eval mode, on the CPU, in float32.

    num_classes: the number of classes that it must have; None: as many as the values are for. hint: name --network in
    the message for a file that does not fit the default. Raises BadInput for a
    file whose keys or shapes do not fit, and for invalid values (see `fill`).
    """
    classes = num_classes or CLASSES
    model = make(network, classes)
    state = load_state(path, model.state_dict().keys())
    pairs = {sizes for key, value in model.state_dict().items() if key in state and is_plain(state[key])
             for sizes in zip(state[key].shape, value.shape) if sizes[0] != sizes[1]}
    found, wanted = pairs.pop() if len(pairs) == 1 else (0, 0)
    if wanted == classes and 1 <= found < 2**16:  # the number of classes is all that keeps the values from fitting
        if num_classes is not None:
            raise BadInput(f"{path} is of a network with {found} classes, expected {num_classes}: give --data with as "
                           "many classes, or another checkpoint")
        model, classes = make(network, found), found
    made_for = f" ({classes} classes)" * ("num_classes=" not in network)
    other = "; if it is of another one, give its --network" * (hint and network == DEFAULT)
    return fill(model, state, f"{path} does not fit {network}{made_for}{other}")
