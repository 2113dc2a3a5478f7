"""The packed file, .mnet: every value that inference needs, each at its stated width. This text specifies it.

Integers and floats are little-endian. A bit stream is packed with the highest bit of each byte first, and filled up
with zeros to a whole byte.

  bytes      content
  4          "MNET"
  1          version: 1, the MobileNetV2 of mobilenet_v2.py, or 2, any network
  1          0
  2          number of classes, unsigned
  8          version 1: width multiplier, float64
  2, ...     version 2: length of the network's specification, unsigned, and the specification (networks.py) in UTF-8
  4, 4       version 2: mean and deviation of the input, float32; in version 1 they are 128 and 64
  32         version 2: digest of the network's operations (graph.Graph.digest), which a decoder may skip
  2 each     the activation points: format; exponent
  2, ...     each parameter: format; exponent; then, if the format says
               float16     its values, 2 bytes each
               mask        a bit stream with a bit for every position, 1 where the code is not 0; and then a second bit
                           stream, of the codes at these positions
               neither     a bit stream of all codes
  32         SHA-256 of all bytes before

A format is one byte: 0x80 a mask, 0x40 float16, 0x20 a signed activation, and in the lower five bits the width b of a
code, from 1 to 16; that of float16 is 0x50. An exponent e is a signed byte. A code of b bits stands for code x 2^e. The
codes of parameters, and of signed activations, are in two's complement. A weight may be stored with a mask or without;
`pack` takes what `counting.layout` finds cheaper.

Order. The parameters are in the order of `named_parameters()`, each in row-major order, a convolution's as
[out, in / groups, height, width]; their shapes are the network's. The activation points are in the order in which the
forward pass computes them. The rules in graph.py find them in any network. Our MobileNetV2 has 55: the image;
the ReLU of the stem; for each of 17 blocks both ReLUs and the block's output; the ReLU of the head; the pooled
features. Its parameters: conv1.weight, bn1.weight, bn1.bias; for each block conv1, bn1, conv2, bn2, conv3, bn3 and,
where it has one, the shortcut's convolution and BatchNorm; conv2, bn2; linear.weight, linear.bias.

Meaning. A pixel p from 0 to 255 enters as (p - mean) / deviation. At an activation point a value v becomes the code
v / 2^e, rounded with halves to even, and clipped to the codes of its format: 0 to 2^b - 1, or, signed, -2^(b-1) to
2^(b-1) - 1; after a ReLU6 not above 6 / 2^e, rounded. Everything between two points is exact. BatchNorms are folded:
y = weight x + bias, and their mean is 0 and their variance 1 - eps. A mean is the sum times 1/n. The result of a
pointwise function is the value of the point after it: a table of codes, which is not stored, because it follows from
the function and both steps. Hard swish and hard sigmoid are computed in double precision, x min(max(x + 3, 0), 6) / 6
in this order; sigmoid, SiLU and GELU (with erf), too, and then rounded to float32, so that no code depends on the last
bits of a machine's exp or erf. `num_batches_tracked` is no part of inference: it is read back as 0.
"""
import hashlib
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compressed import cifar100, claims, counting, networks
from compressed.errors import BadInput, refused
from compressed.files import replacing
from compressed.formats import Grid, stored_exponent
from compressed.graph import prepare, read_graph

MAGIC, VERSIONS = b"MNET", (1, 2)
HEADER, WIDTH, LENGTH, INPUT = (struct.Struct(form) for form in ("<4sBBH", "<d", "<H", "<ff32s"))
FORMAT = struct.Struct("<Bb")
BITS, SIGNED, HALF, MASKED = 0x1F, 0x20, 0x40, 0x80
CHECKSUM = 32


# ------------------------------------------------------------------------------------------------------- bit streams

def to_bits(codes: np.ndarray, bits: int) -> bytes:
    """Return signed codes [n] as a bit stream, `bits` (1 to 16) each."""
    planes = codes.astype(np.int16)[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.int16)
    return np.packbits((planes & 1).astype(np.uint8)).tobytes()


def from_bits(stream: bytes, n: int, bits: int) -> np.ndarray:
    """Return the n signed codes (int32) of a bit stream."""
    planes = np.unpackbits(np.frombuffer(stream, np.uint8), count=n * bits).reshape(n, bits).astype(np.int32)
    places = 1 << np.arange(bits - 1, -1, -1, dtype=np.int32)
    places[0] *= -1  # two's complement
    return planes @ places


class Reader:
    """Take bytes from the front. Raises BadInput when there are too few, before anything is allocated for them."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes. Raises BadInput if there are fewer."""
        part = self.data[self.position:self.position + size]
        if len(part) < size:
            raise BadInput("it ends too early")
        self.position += size
        return part

    def bits(self, n: int, bits: int) -> np.ndarray:
        """Return the next n numbers of so many bits each, which end at a whole byte."""
        return from_bits(self.take((n * bits + 7) // 8), n, bits)


# ------------------------------------------------------------------------------------------------- one tensor and back

def pack_tensor(values: Tensor, grid: Grid, name: str, masked: bool) -> tuple[bytes, bytes, bytes]:
    """Return the parts of a parameter's record, in their order in the file: format and exponent, mask, values."""
    if grid.kind == "float16":
        return FORMAT.pack(16 | HALF, 0), b"", values.half().flatten().numpy().astype("<f2").tobytes()
    if len(grid.steps) != 1 or grid.bits > 16:
        raise BadInput(f"{name} ({grid.kind}) has {grid.bits} bits and {len(grid.steps)} steps: "
                       f"the packed file holds float16, and codes of up to 16 bits with one step a tensor")
    e, codes = stored_exponent(grid.steps[0], name), grid.codes(values).flatten().numpy()
    if not masked:
        return FORMAT.pack(grid.bits, e), b"", to_bits(codes, grid.bits)
    mask = codes != 0
    return FORMAT.pack(grid.bits | MASKED, e), np.packbits(mask).tobytes(), to_bits(codes[mask], grid.bits)


def unpack_tensor(reader: Reader, shape: torch.Size, name: str) -> tuple[Tensor, dict]:
    """Read a parameter's record; return its float32 values and their entry in a claim's "tensors"."""
    n, start = shape.numel(), reader.position
    kind, e = FORMAT.unpack(reader.take(FORMAT.size))
    if kind == HALF | 16:
        values = np.frombuffer(reader.take(2 * n), "<f2").astype(np.float32)
        grid = Grid(16, kind="float16")
    else:
        grid = Grid(kind & BITS, (2.0**e,))
        if not 1 <= grid.bits <= 16 or kind & (HALF | SIGNED):
            raise BadInput(f"{name} has the unknown format {kind:#04x}")
        if kind & MASKED:
            mask, codes = reader.bits(n, 1) != 0, np.zeros(n, np.int32)
            codes[mask] = reader.bits(int(mask.sum()), grid.bits)
        else:
            codes = reader.bits(n, grid.bits)
        with np.errstate(over="ignore"):  # it is checked below
            values = np.ldexp(codes, e).astype(np.float32)  # exact: 16 bits
    if not np.isfinite(values).all():
        raise BadInput(f"{name} holds values that are not finite")
    values = torch.from_numpy(values).view(shape)
    if b"".join(pack_tensor(values, grid, name, bool(kind & MASKED))) != reader.data[start:reader.position]:
        raise BadInput(f"{name} is not stored as it has to be: its float16 values have an exponent, bits after its "
                       "last code are not 0, or its mask has a 1 where the code is 0")
    return values, {"name": name, "bits": grid.bits} | ({"step": grid.steps[0]} if grid.steps else {"kind": grid.kind})


# --------------------------------------------------------------------------------------------------- the file and back

def header(model: nn.Module, spec: str) -> bytes:
    """Return the header of a network: of version 1 if that can say which one it is."""
    graph = read_graph(model)
    classes = graph.points[-1].shape[0]
    if (width := networks.width(spec)) is not None:
        return HEADER.pack(MAGIC, 1, 0, classes) + WIDTH.pack(width)
    text = spec.encode()
    return (HEADER.pack(MAGIC, 2, 0, classes) + LENGTH.pack(len(text)) + text
            + INPUT.pack(cifar100.MEAN, cifar100.STD, bytes.fromhex(graph.digest)))


def pack(model: nn.Module, claim: dict, path) -> dict[str, int]:
    """Write the packed file of a shipped model; return the bytes of its sections, named as in `counting.storage`.

    What was packed is unpacked and compared before a byte is written. Raises BadInput if the claim does not fit the
    model, or if anything would not be read back unchanged.
    """
    spec = claim.get("network", {}).get("spec", networks.DEFAULT)
    formats = claims.stated_formats(model, claim)
    steps = {entry["name"]: entry.get("step") for entry in claim["activations"]}
    layouts = {f"{name}.weight": each for name, each in counting.layouts(read_graph(model).operations, formats).items()}
    parts = [("header", header(model, spec))]
    for name in read_graph(model).activation_points:
        activation = formats.activations[name]
        if activation.bits > 16:
            raise BadInput(f"activation {name} has {activation.bits} bits: the packed file holds up to 16")
        parts.append(("steps", FORMAT.pack(activation.bits | SIGNED * activation.signed,
                                           stored_exponent(steps[name], name))))
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        kind = "weights" if name in layouts else "batchnorm" if isinstance(owner, nn.BatchNorm2d) else "biases"
        record = pack_tensor(parameter.detach(), formats.tensors[name], name,
                             masked=name in layouts and layouts[name].masked)
        parts += zip(("steps", "masks", kind), record)
    data = b"".join(part for _, part in parts)
    parts.append(("checksum", hashlib.sha256(data).digest()))
    data += parts[-1][1]

    try:
        problems = differences(model, claim, *unpack_bytes(data, spec))
    except BadInput as error:
        raise BadInput(f"the packed file cannot hold this network as {spec}: {error}") from error
    if problems:
        raise BadInput("the packed file cannot hold " + ", ".join(problems))
    with replacing(path) as file:
        file.write(data)
    sections = Counter()
    for kind, part in parts:
        sections[kind] += len(part)
    return dict(sections) | {"total": len(data)}


def differences(model: nn.Module, claim: dict, other: nn.Module, other_claim: dict) -> list[str]:
    """Return the names of what differs in two networks: values that inference reads, and formats."""
    ours, theirs = model.state_dict(), other.state_dict()
    inference_reads = {name for network in (model, other) for name, _ in network.named_parameters()}
    found = [key for key in sorted(ours.keys() | theirs.keys())
             if (key in inference_reads or key.endswith((".running_mean", ".running_var")))
             and not (key in ours and key in theirs and torch.equal(ours[key], theirs[key]))]
    return found + format_differences(claim, other_claim)


def format_differences(claim: dict, other: dict) -> list[str]:
    """Return "the format of NAME" for every tensor and activation whose formats two claims state differently."""
    found = []
    for key in ("tensors", "activations"):
        ours, theirs = ({name: [entry.get(k) for k in ("bits", "step", "kind", "signed")]
                         for name, entry in claims.entries(each, key, "the claim").items()} for each in (claim, other))
        found += [f"the format of {name}" for name in sorted(ours.keys() | theirs.keys())
                  if ours.get(name) != theirs.get(name)]
    return found


def unpack(path, network: str | None = None) -> tuple[nn.Module, dict]:
    """Return (the model in eval mode, its claim: {"network", "tensors", "activations"}) of a packed file.

    network: the user's --network, or None (see networks.followed). Raises BadInput, and nothing else, if the file is
    missing, foreign, cut, damaged, or of another version or network.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file")
    with refused(f"{path}: not readable", errors=OSError):
        data = Path(path).read_bytes()
    try:
        return unpack_bytes(data, network)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def stated_network(reader: Reader, network: str | None) -> tuple[nn.Module, dict]:
    """Read the header; return the network that it names, without values, and what a claim says of that network."""
    _, version, zero, classes = HEADER.unpack(reader.take(HEADER.size))
    if zero:
        raise BadInput(f"the byte after its version is {zero}, expected 0")
    if version not in VERSIONS:
        raise BadInput(f"a packed network of version {version}; this program reads versions 1 and 2")
    if not classes:
        raise BadInput("a network without classes")
    if version == 1:
        (width,) = WIDTH.unpack(reader.take(WIDTH.size))
        if not 0 < width <= 8:
            raise BadInput(f"a network with the width multiplier {width}")
        spec = f"{networks.DEFAULT}?width={width!r}"
    else:
        with refused("the name of its network is no text"):
            spec = reader.take(*LENGTH.unpack(reader.take(LENGTH.size))).decode()
    spec = networks.followed(spec, network)
    try:
        with torch.device("meta"):  # shapes alone: memory is taken only for values that the file really has
            model = networks.make(spec, classes)
    except BadInput:
        if network is None:
            raise
        model = networks.make(spec, classes).to("meta")  # the user's own network, which computes with values
    model = prepare(model)
    if version == 1:
        return model, claims.network(spec, model)
    mean, std, digest = INPUT.unpack(reader.take(INPUT.size))
    stated = {"spec": spec, "classes": classes, "mean": mean, "std": std, "graph": digest.hex()}
    if problem := claims.other_network(stated, model):
        raise BadInput(problem)
    return model, stated


def unpack_bytes(data: bytes, network: str | None = None) -> tuple[nn.Module, dict]:
    """Return what `unpack` does, of a packed file's content."""
    if data[:len(MAGIC)] != MAGIC:
        raise BadInput("not a packed network (.mnet): it does not begin with MNET")
    if len(data) < HEADER.size + CHECKSUM or hashlib.sha256(data[:-CHECKSUM]).digest() != data[-CHECKSUM:]:
        raise BadInput("damaged or cut: its SHA-256 is not the one at its end")  # before anything in it is believed
    reader = Reader(data[:-CHECKSUM])
    model, stated = stated_network(reader, network)
    tensors, activations, state = [], [], {}
    for name in read_graph(model).activation_points:
        kind, e = FORMAT.unpack(reader.take(FORMAT.size))
        if not 1 <= kind & BITS <= 16 or kind & (HALF | MASKED):
            raise BadInput(f"activation {name} has the unknown format {kind:#04x}")
        activations.append({"name": name, "bits": kind & BITS, "signed": bool(kind & SIGNED), "step": 2.0**e})
    for name, parameter in model.named_parameters():
        state[name], entry = unpack_tensor(reader, parameter.shape, name)
        tensors.append(entry)
    if reader.position != len(reader.data):
        raise BadInput(f"{len(reader.data) - reader.position} bytes are left over")
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):  # folded
            state[f"{name}.running_mean"] = torch.zeros(norm.num_features)
            state[f"{name}.running_var"] = torch.full((norm.num_features,), 1 - norm.eps)
            state[f"{name}.num_batches_tracked"] = torch.tensor(0)
    for name, value in model.state_dict().items():  # further buffers: no operation reads them, so they were not packed
        state.setdefault(name, torch.zeros_like(value, device="cpu"))
    model.load_state_dict(state, assign=True)
    return model.eval(), {"network": stated, "tensors": tensors, "activations": activations}
