"""Damage every kind of file that the project reads, and see whether anybody notices.

    python tests/fuzz.py [--count 1000] [--seed 0] [--kinds claim state.json ...]

Each file is damaged `count` times, by bits, bytes and blocks, and those of JSON by their values too, and then read as
the scripts read it. What may come of it:

    refused    one line (BadInput, or an OSError that run_script prints): the only right answer to a change
    same       the file was accepted, and what was read from it is what was written: the change touched nothing
    accepted   silently, with other contents                                                    a hole
    traceback  any other exception                                                              a bug

Two sorts of files may be accepted with other contents. A text that a user writes (a recipe, a bit table) or only reads
(a log, from which no run is resumed) has nothing that would contradict it. And a digest can be computed anew by whoever
alters a record on purpose: "signed again". A traceback is a bug there too. Exit status 1 if there was a hole or a bug.
"""
import contextlib
import copy
import io
import json
import pickle
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import quantize
from compressed import checkpoints, cifar100, claims, datasets, grids, kaist, kernels, mnet
from compressed import files as files_module
from compressed.command_line import command_line, number, run_script
from compressed.errors import BadInput
from compressed.files import load_json, save_record, save_tensors, sha256
from compressed.networks import load_checkpoint
from small import CLASSES, WIDTH, tiny_network
from tiny import Tiny
from training import arguments, loop, recipes, teachers
from training.runs import load_lines
from training.state import State

WEIRD = (None, True, "", "x", "nan", -1, 0, 1, 10**9, 10**30, 1e308, 0.5, -0.0, float("nan"), float("inf"), [], {}, [1],
         {"a": 1}, "../x")
TEXTS = ("log", "recipe", "bit table")


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return the content with bits flipped; bytes overwritten, removed or added; blocks zeroed; or the end cut off."""
    data, n = bytearray(content), len(content)
    at, other, size = rng.randrange(n), rng.randrange(n), rng.choice((1, 2, 8, 64, 512))
    size = min(size, n - at)
    kind = rng.choice(("flip", "flip", "flip", "overwrite", "zero", "remove", "insert", "exchange", "cut"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 1, 2, 16))):
            data[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == "exchange":
        data[at], data[other] = data[other], data[at]
    else:
        end = {"insert": at, "cut": n}.get(kind, at + size)
        put = {"insert": rng.randbytes(size), "overwrite": rng.randbytes(size), "zero": bytes(size)}
        data[at:end] = put.get(kind, b"")
    return bytes(data)


def damage_value(record, rng: random.Random):
    """Return a JSON record with one value replaced by a weird one, one key renamed, or one thing left out."""
    record = copy.deepcopy(record)
    places, stack = [], [record]
    while stack:
        each = stack.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each))
        places += [(each, key) for key in keys]
        stack += [each[key] for key in keys if isinstance(each[key], (dict, list))]
    shallow = [place for place in places if place[0] is record]
    container, key = rng.choice(shallow if rng.random() < 0.3 else places)
    kind = rng.randrange(4)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[key + "x"] = container.pop(key)
    else:
        container[key] = rng.choice(WEIRD)
    return record


def same(one, other) -> bool:
    """Return True if two things that were read are the same, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, type(one)) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one and other != other)


# ---- The files, and how each is read -------------------------------------------------------------

def small_checkpoint(path, *_):
    return load_checkpoint(path, f"mobilenet_v2:MobileNetV2?width={WIDTH}", CLASSES)


def network_and_claim(path):
    model, claim = checkpoints.load(path)
    return {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}, claim


def unpacked(path):
    model, claim = mnet.unpack(path)
    return dict(model.named_parameters()), claim


def resolved(recipe):
    """Return the options of every stage that a recipe gives."""
    content = recipes.read(recipe)
    return {stage: vars(parser.parse_args(recipes.words(content, stage, parser))) for stage, parser in (
        ("pretrain", arguments.make_parser()), ("rew", arguments.make_parser()), ("masked", arguments.make_parser()),
        ("quantized", quantize.make_parser()))}


def networks(folder: Path) -> dict:
    model, claim = tiny_network()
    save_tensors(model.state_dict(), folder / "network.pt")
    save_record(claim | {"sha256": sha256(folder / "network.pt"), "accuracy": {"correct": 1}, "made_by": {"seed": 0}},
                folder / "network.json")
    save_tensors(model.state_dict(), folder / "float.pt")
    spec = f"mobilenet_v2:MobileNetV2?width={WIDTH}"  # version 1 knows the width alone
    for name, version in (("one", spec), ("two", f"{spec}&num_classes={CLASSES}")):
        mnet.pack(model, claim | {"network": claims.network(version, model)}, folder / f"{name}.mnet")
    micronet = kaist.Micronet().state_dict()
    micronet["linear.mask"] = torch.ones_like(micronet["linear.weight"])
    save_tensors(micronet, folder / "teacher.t7")
    (folder / "table.toml").write_text('default = 8\n[bits]\n"layers.3.conv2" = 4\ndepthwise = 6\n"conv1" = 8\n')
    return {".pt": (folder / "network.pt", network_and_claim),
            ".pt without a claim": (folder / "float.pt", lambda path: small_checkpoint(path).state_dict()),
            "claim": (folder / "network.json", lambda path: network_and_claim(path.with_suffix(".pt"))),
            ".mnet version 1": (folder / "one.mnet", unpacked), ".mnet version 2": (folder / "two.mnet", unpacked),
            "teacher": (folder / "teacher.t7", lambda path: teachers.load(path).state_dict()),
            "bit table": (folder / "table.toml", lambda path: grids.bit_table(str(path), model))}


def run(folder: Path) -> dict:
    """Return the kinds of files of a run folder, of a stage that was stopped in its second epoch."""
    with contextlib.redirect_stdout(None):
        for _ in range(3):  # a step each
            loop.train("fuzz", Tiny(100), cifar100.made_up(40, 0), None,
                       loop.Settings(epochs=3, batch_size=20, refresh=0), folder, max_seconds=0)
    state, options = folder / "fuzz.state", folder / "masked.options.json"
    record, saved = load_json(state / "state.json"), State(state, None)
    saved.settings = record["settings"]

    def load_state(_):
        return saved.load("cpu", 2)

    save_record({"machine": "CPU", "train_images": 40, "options": {}, "settings": {"augment": "plain", "lr": 0.1}},
                options)
    shutil.copy(folder / "fuzz.jsonl", folder / "masked.jsonl")
    shutil.copy(recipes.FOLDER / "default.toml", folder / "recipe.toml")
    return {**{f"state part {part}": (state / name, load_state) for part, name in record["files"].items()},
            "state.json": (state / "state.json", load_state),
            "log": (folder / "fuzz.jsonl", lambda path: [line["step"] for line in load_lines(path)]),
            "options": (options, lambda path: quantize.training_record(path.with_name("masked.pt"))),
            "recipe": (folder / "recipe.toml", resolved)}


def images(folder: Path) -> dict:
    for split, n in (("train", 200), ("test", 100)):
        content = {"data": np.random.default_rng(n).integers(0, 256, (n, 3072), np.uint8),
                   "fine_labels": [i % 100 for i in range(n)]}
        (folder / split).write_bytes(pickle.dumps(content, 4))
        cifar100.FINGERPRINT[split] = cifar100.fingerprint(cifar100.digests(*cifar100.read(folder / split)))
        cifar100.COUNT[split] = n
    four = cifar100.made_up(40, 0, classes=4)
    pictures, labels = four.images.permute(0, 2, 3, 1).numpy(), four.labels.numpy()
    np.savez(folder / "set.npz", train_images=pictures, train_labels=labels, test_images=pictures[:9],
             test_labels=labels[:9])
    return {"CIFAR-100": (folder / "train", lambda path: vars(cifar100.load(path.parent, "train"))),
            ".npz of images": (folder / "set.npz", lambda path: vars(datasets.load(path)))}


@contextlib.contextmanager
def files(folder: Path):
    """Make the files in a folder, and yield {kind: (path, function that reads it)}. They are smaller than real ones."""
    with mock.patch.object(checkpoints, "load_checkpoint", small_checkpoint), mock.patch.dict(cifar100.COUNT), \
            mock.patch.dict(cifar100.FINGERPRINT), mock.patch.object(kernels, "library", lambda dtype: None):
        yield networks(folder) | run(folder) | images(folder)


# ---- The attack ----------------------------------------------------------------------------------

def outcome(path, read, wanted) -> str:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found = read(path)
    except (BadInput, OSError) as error:
        return "refused" if "\n" not in str(error) else f"traceback: {type(error).__name__} of several lines"
    except SystemExit as ended:  # argparse, for an option of a recipe
        return "refused" if ended.code == 2 else f"traceback: status {ended.code}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error)[:100]}"
    return "same" if same(found, wanted) else "accepted"


def attack(path: Path, read, count: int, rng: random.Random) -> dict[str, Counter]:
    """Return {how: Counter of outcomes} of a file's damages; the file is as it was afterwards."""
    original, wanted = path.read_bytes(), read(path)
    ways = ("bytes", "values", "values, signed again") if path.suffix == ".json" else ("bytes",)
    found = {how: Counter() for how in ways}
    try:
        for i in range(count):
            how = ways[i % len(ways)]
            if how == "bytes":
                content = damage_bytes(original, rng)
            else:
                record = damage_value(json.loads(original), rng)
                if "signed" in how:
                    with mock.patch.object(files_module, "to_json", json.dumps):  # which takes NaN and infinity, too
                        record = record | {"digest": files_module.digest(record)}
                content = json.dumps(record).encode()
            if content != original:
                path.write_bytes(content)
                found[how][outcome(path, read, wanted)] += 1
    finally:
        path.write_bytes(original)
    return found


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--count", type=number(int, 1, 10**9), default=1000, metavar="N",
                        help="damaged files of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--kinds", nargs="+", metavar="K", help="only these kinds")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    total = holes = bugs = 0
    with tempfile.TemporaryDirectory() as folder, files(Path(folder)) as kinds:
        for kind in args.kinds or kinds:
            if kind not in kinds:
                parser.error(f"no kind {kind!r}; there are: {', '.join(kinds)}")
            for how, outcomes in attack(*kinds[kind], args.count, random.Random(f"{args.seed} {kind}")).items():
                total += outcomes.total()
                holes += outcomes["accepted"] if "signed" not in how and kind not in TEXTS else 0
                bugs += sum(times for name, times in outcomes.items() if name.startswith("traceback"))
                print(f"{kind + ', ' + how:<40}"
                      + ", ".join(f"{times} {name}" for name, times in sorted(outcomes.items())), flush=True)
    print(f"{total:,} damaged files: {holes} silently accepted, {bugs} with a traceback")
    return int(holes + bugs > 0)


if __name__ == "__main__":
    run_script(main)
