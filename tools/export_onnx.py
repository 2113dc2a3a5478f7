"""Export a shipped checkpoint as an ONNX model whose convolutions onnxruntime runs with its 8-bit kernels.

    python -m tools.export_onnx             writes cifar100_mobilenetv2.onnx
    python -m tools.export_onnx --verify    also runs it on the test set, compares it with exact_network, lists kernels
    python -m tools.export_onnx --record    --verify, and writes the result into the checkpoint's claim

Input `image`: pixels, uint8 [N, 3, 32, 32]. Output `logits`: float32 [N, classes]. The model has only standard
operators of opset 17, with QuantizeLinear and DequantizeLinear around every layer, and its weights are the stored
codes. Any engine can run it in floats; an engine that fuses these operators computes in integers.

  image                 step 1/64 and zero point 128, which is the normalisation
  activations           uint8. Unsigned ones have zero point 0, so that the lower clip is the ReLU; signed ones have
                        128, because onnxruntime fuses a convolution only if input and output have the same type
  BatchNorm's scale a   part of the weights' step, step x a for every output channel; for a < 0 the codes change sign
  BatchNorm's shift     an int32 bias, in units of the accumulator (input step x weight step x |a|)
  residual sums         added before rounding, as the network is defined. The 1x1 convolutions that are added are matrix
                        products with float32 results; convolutions would be rounded to 8 bits before the sum
  mean of a whole map   a GlobalAveragePool
  linear layer          a matrix product; its bias is float32

The engine computes in float32 between an accumulator and the next codes. What quantize.py ships by default (the scheme
"channel") is made for that: shifts are whole units of the accumulator, halves are rounded to even, and scales have 5
significant bits, so that products with accumulators of up to 19 bits and a sign are exact. All accumulators are that
small on the test images (ACCOUNT.md), but a residual sum may need more bits, so this is no proof. --verify therefore
compares: the shipped checkpoint's logits are the same to the last bit on all test images. The schemes "layer" and
"power-of-two" cannot have short scales. There some shifts are rounded by up to half a unit, which changes few codes by
one, but these changes spread: after some ten layers a third of all codes differ. --verify shows what becomes of the
predictions.

onnxruntime has no 6-bit kernels: 6-bit codes are stored as int8 and run at the speed of 8 bits. Zeros cost as much as
any code. x86 CPUs without VNNI add 8-bit products in pairs in 16 bits, which saturate; `session` detects that and asks
for exact kernels.
"""
import functools
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compressed import checkpoints, cifar100, claims, datasets, threads
from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import needed, run_script, some_path
from compressed.errors import BadInput
from compressed.evaluation import answers, logits
from compressed.exact_network import RELU6, exact_network, folded, table
from compressed.files import check_outputs, git_commit, replacing, sha256
from compressed.formats import Activation
from compressed.graph import Branch, Point, Window, read, weight_layers
from compressed.mnet import stated_formats
from tools.agreement import agreement, describe, option_parser

OPSET, IR_VERSION = 17, 8  # of 2022: old enough for every engine
BATCH = 32
NOTICED = 0.999  # share of the predictions that must agree


# ---- The ONNX graph ------------------------------------------------------------------------------

class Graph:
    """Build an ONNX model along the activation points of a network; Floats and Codes say how each is computed.

    Values are represented by their names. They are maps [N, C, H, W]; features after pooling are maps of 1x1.
    """

    def __init__(self, model: nn.Module):
        self.onnx, self.model, self.read = needed("onnx"), model, read(model)
        self.shapes = {point.name: point.shape for point in self.read.points}
        self.nodes, self.constants = [], {}

    def node(self, operator: str, name: str, *inputs: str, **attributes) -> str:
        """Add a node; return the name of its output, which is the node's."""
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value, dtype) -> str:
        array = np.ascontiguousarray(value, dtype)
        self.constants[name] = self.onnx.numpy_helper.from_array(array.reshape(np.shape(value)), name)
        return name

    def window(self, branch: Branch) -> dict:
        """Return the attributes of a convolution or a pooling."""
        window = branch.window
        found = {"kernel_shape": window.kernel, "strides": window.stride, "pads": window.padding * 2}
        if window.dilation != (1, 1):
            found["dilations"] = window.dilation
        return found | ({"group": self.model.get_submodule(branch.name).groups} if branch.kind == "layer" else {})

    def sums(self, point: Point, values: dict[str, str]) -> str:
        """Add up a point's branches in float32."""
        first, *others = [self.summand(branch, values) for branch in point.branches]
        for i, other in enumerate(others):
            first = self.node("Add", f"{point.name}.sums" + f".{i}" * (i > 0), first, other)
        return first

    def term(self, branch: Branch, values: dict[str, str]) -> str:
        """Compute a branch that is no layer, in float32 [N, C, H, W]."""
        name, x = branch.name, self.dequantized(branch.name, values[branch.source])
        if branch.kind == "unchanged":
            return x
        if branch.kind == "norm":
            scale, shift = (part.numpy()[:, None, None] for part in folded(self.model.get_submodule(branch.norm)))
            scaled = self.node("Mul", f"{name}.scaled", x, self.constant(f"{name}.scale", scale, np.float32))
            return self.node("Add", f"{name}.sums", scaled, self.constant(f"{name}.shift", shift, np.float32))
        if branch.kind == "product":
            return self.node("Mul", f"{name}.products", x, self.dequantized(f"{name}.factor", values[branch.other]))
        if branch.kind == "moved":
            return self.moved(branch, x)
        if branch.kind == "mean" and branch.window.kernel == self.shapes[branch.source][1:]:
            return self.node("GlobalAveragePool", f"{name}.sums", x)
        return self.node("AveragePool" if branch.kind == "mean" else "MaxPool", f"{name}.sums", x,
                         **self.window(branch))

    def moved(self, branch: Branch, x: str) -> str:
        """Gather elements of x by their position in the flattened map, before which a zero is inserted."""
        name, shape = branch.name, [*branch.index.shape, 1, 1][:3]
        flat = self.node("Flatten", f"{name}.flat", x)
        padded = self.node("Pad", f"{name}.padded", flat, self.constant(f"{name}.pads", [0, 1, 0, 0], np.int64))
        places = self.constant(f"{name}.places", branch.index.flatten().numpy(), np.int64)
        gathered = self.node("Gather", f"{name}.gathered", padded, places, axis=1)
        return self.node("Reshape", f"{name}.sums", gathered, self.constant(f"{name}.shape", [-1, *shape], np.int64))

    def finished(self, about: dict[str, str]):
        """Build all points; return the checked ModelProto. about: its metadata."""
        values = {}
        for point in self.read.points:
            kind = point.branches[0].kind
            if point.name == "logits":
                self.node("Flatten", "logits", self.sums(point, values))
            else:
                make = {"pixels": self.image, "function": self.function}.get(kind, self.stored)
                values[point.name] = make(point, values)
        helper, types = self.onnx.helper, self.onnx.TensorProto
        image = helper.make_tensor_value_info("image", types.UINT8, ["N", 3, IMAGE_SIZE, IMAGE_SIZE])
        logits = helper.make_tensor_value_info("logits", types.FLOAT, ["N", *self.shapes["logits"]])
        graph = helper.make_graph(self.nodes, "mobilenet_v2", [image], [logits], list(self.constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
                                  producer_name="export_onnx.py")
        helper.set_model_props(model, about)
        self.onnx.checker.check_model(model, full_check=True)
        return model


class Floats(Graph):
    """The network in float32 with folded BatchNorms, whose speed is compared with that of 8 bits."""

    def image(self, point: Point, values: dict[str, str]) -> str:
        return self.node("DequantizeLinear", "image.normalised", "image",
                         self.constant("image.step", 1 / cifar100.STD, np.float32),
                         self.constant("image.zero", cifar100.MEAN, np.uint8))

    def dequantized(self, reader: str, x: str) -> str:
        return x

    def summand(self, branch: Branch, values: dict[str, str]) -> str:
        if branch.kind != "layer":
            return self.term(branch, values)
        name, x, layer = branch.name, values[branch.source], self.model.get_submodule(branch.name)
        scale = torch.ones(len(layer.weight))
        shift = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
        if branch.norm:
            scale, constant = folded(self.model.get_submodule(branch.norm))
            shift = constant + scale * shift
        weight = layer.weight.detach().double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
        weight = self.constant(f"{name}.weight", weight.numpy(), np.float32)
        bias = self.constant(f"{name}.bias", shift.numpy(), np.float32)
        if isinstance(layer, nn.Linear):
            return self.node("Gemm", f"{name}.sums", self.node("Flatten", f"{name}.input", x), weight, bias, transB=1)
        return self.node("Conv", f"{name}.sums", x, weight, bias, **self.window(branch))

    def stored(self, point: Point, values: dict[str, str]) -> str:
        x = self.sums(point, values)
        if point.activation == "relu6":
            limits = [self.constant(f"{point.name}.{end}", end, np.float32) for end in (0, 6)]
            return self.node("Clip", point.name, x, *limits)
        return self.node("Relu", point.name, x) if point.activation == "relu" else x

    def function(self, point: Point, values: dict[str, str]) -> str:
        function, x = point.branches[0].function, values[point.branches[0].source]
        if function == "silu":
            return self.node("Mul", point.name, x, self.node("Sigmoid", f"{point.name}.sigmoid", x))
        if function == "gelu":  # x (1 + erf(x / sqrt 2)) / 2: opset 17 has no operator of that name
            root, half = (self.constant(f"{point.name}.{i}", 0.5**i, np.float32) for i in (0.5, 1))
            erf = self.node("Erf", f"{point.name}.erf", self.node("Mul", f"{point.name}.scaled", x, root))
            halves = self.node("Mul", f"{point.name}.half", x, half)
            return self.node("Add", point.name, halves, self.node("Mul", f"{point.name}.product", halves, erf))
        operator, *alpha = {"hardswish": ["HardSwish"], "hardsigmoid": ["HardSigmoid", 1 / 6],
                            "sigmoid": ["Sigmoid"]}[function]
        return self.node(operator, point.name, x, **dict(zip(["alpha"], alpha)))


class Codes(Graph):
    """The network in codes: between layers there are uint8 values, and each layer dequantizes its inputs.

    grids: (step, names of the constants that hold step and zero point) of each uint8 value. Counted, for the report:
    turned, output channels with a negative scale whose codes changed their sign; kept, those that have a code -128 and
    get a negative step instead; rounded, shifts that are no whole number of accumulator units. Raises BadInput for
    formats that 8-bit kernels do not have.
    """

    def __init__(self, model: nn.Module, claim: dict):
        super().__init__(model)
        self.formats = stated_formats(model, claim)
        self.steps = {entry["name"]: entry["step"] for entry in claim["activations"]}
        self.grids: dict[str, tuple[float, str, str]] = {}
        self.turned = self.kept = self.rounded = 0
        for name, activation in self.formats.activations.items():
            if activation.bits > 8:
                raise BadInput(f"activation {name} has {activation.bits} bits: QuantizeLinear clips to 8")
        for name in self.read.images:
            if self.steps[name] != 1 / cifar100.STD or self.formats.activations[name].bits != 8:
                raise BadInput(f"the image has {self.formats.activations[name].bits} bits and the step "
                               f"{self.steps[name]}: expected 8, and 1/{cifar100.STD}, the pixels' own")
        for name, layer in weight_layers(model):
            grid = self.formats.tensors[f"{name}.weight"]
            if grid.bits > 8 or len(grid.steps) != 1:
                raise BadInput(f"{name}.weight has {grid.bits} bits and {len(grid.steps)} steps: expected at most 8, "
                               "and one")

    # -- values and their grids

    def grid(self, name: str, value: str) -> tuple[str, str]:
        """Return the names of step and zero point of an activation point, whose codes are the value `value`."""
        zero = 128 if self.formats.activations[name].signed else 0
        self.grids[value] = (self.steps[name], self.constant(f"{name}.step", self.steps[name], np.float32),
                             self.constant(f"{name}.zero", zero, np.uint8))
        return self.grids[value][1:]

    def dequantized(self, reader: str, x: str) -> str:
        """Dequantize x, for a node with the name `reader`."""
        return self.node("DequantizeLinear", f"{reader}.input", x, *self.grids[x][1:])

    def transposed(self, x: str, name: str, order: list[int]) -> str:
        """Transpose the codes x. onnxruntime computes in NHWC, so all these transpositions cancel out."""
        self.grids[name] = self.grids[x]
        return self.node("Transpose", name, x, perm=order)

    def rounded_to(self, point: Point, x: str, value: str) -> str:
        """Round the float32 value x of a point to codes with the name `value`.

        Fewer than 8 bits, and the upper clip of a ReLU6, are a clip of codes.
        """
        activation = self.formats.activations[point.name]
        high = activation.high
        if point.activation == "relu6":
            high = min(high, round(RELU6 / self.steps[point.name]))
        low, high = (code + 128 * activation.signed for code in (activation.low, high))
        if (low, high) == (0, 255):
            return self.node("QuantizeLinear", value, x, *self.grid(point.name, value))
        codes = self.node("QuantizeLinear", f"{value}.whole", x, *self.grid(point.name, value))
        limits = (self.constant(f"{value}.{end}", code, np.uint8) for end, code in (("low", low), ("high", high)))
        return self.node("Clip", value, codes, *limits)

    def image(self, point: Point, values: dict[str, str]) -> str:
        self.grid(point.name, "image")
        return "image"

    def function(self, point: Point, values: dict[str, str]) -> str:
        """Look up a pointwise function of codes in a table of 256."""
        name, branch = point.name, point.branches[0]
        source, target = (self.formats.activations[each] for each in (branch.source, name))
        source = Activation(8, source.signed)  # codes that fewer bits do not have are never looked up
        entries = table(branch.function, source, self.steps[branch.source], target, self.steps[name]).numpy()
        entries = self.constant(f"{name}.table", entries + 128 * target.signed, np.uint8)
        index = self.node("Cast", f"{name}.index", values[branch.source], to=self.onnx.TensorProto.INT32)
        self.grid(name, name)
        return self.node("Gather", name, entries, index)

    def stored(self, point: Point, values: dict[str, str]) -> str:
        first, *others = point.branches
        linear = first.kind == "layer" and isinstance(self.model.get_submodule(first.name), nn.Linear)
        if others or linear:
            codes = self.rounded_to(point, self.sums(point, values), f"{point.name}.codes")
            return self.transposed(codes, point.name, [0, 3, 1, 2])
        compute = self.convolution if first.kind == "layer" else self.term
        return self.rounded_to(point, compute(first, values), point.name)

    # -- layers

    def layer(self, branch: Branch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (codes int8 in the weight's shape, step and shift of each output channel: float64) of a layer."""
        layer, grid = self.model.get_submodule(branch.name), self.formats.tensors[f"{branch.name}.weight"]
        codes, steps = grid.codes(layer.weight).numpy(), np.full(len(layer.weight), grid.steps[0])
        if branch.norm is None:
            bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
            return codes.astype(np.int8), steps, bias.double().numpy()
        bn = self.model.get_submodule(branch.norm)
        scale, shift = bn.weight.detach().double().numpy(), bn.bias.detach().double().numpy()
        steps = steps * scale
        codes[scale == 0] = 0
        steps[scale == 0] = 2.0**-12 * max(self.steps.values())  # nothing is summed: fine enough for any shift
        turn = (scale < 0) & (codes.reshape(len(codes), -1).min(1) > -128)
        codes[turn], steps[turn] = -codes[turn], -steps[turn]
        self.turned, self.kept = self.turned + int(turn.sum()), self.kept + int((steps < 0).sum())
        return codes.astype(np.int8), steps, shift

    def weight(self, name: str, codes: np.ndarray, steps: np.ndarray, axis: int) -> str:
        """Dequantize constant codes (weights, or int32 biases) with a step for every index of the axis."""
        return self.node("DequantizeLinear", name, self.constant(f"{name}.codes", codes, codes.dtype),
                         self.constant(f"{name}.steps", steps, np.float32), axis=axis)

    def convolution(self, branch: Branch, values: dict[str, str]) -> str:
        """Compute a convolution whose result is rounded: onnxruntime fuses it with its neighbours to a QLinearConv."""
        name, x = branch.name, values[branch.source]
        codes, steps, shift = self.layer(branch)
        units = self.grids[x][0] * steps
        bias = shift / units
        reach = 255 * np.abs(codes.reshape(len(codes), -1).astype(np.int64)).sum(1) + np.abs(bias)
        if reach.max() >= 2**31:
            raise BadInput(f"{name}: a shift of {np.abs(bias[reach.argmax()]):.3g} units does not fit 32 bits")
        self.rounded += int((bias != np.rint(bias)).sum())
        return self.node("Conv", f"{name}.sums", self.dequantized(name, x),
                         self.weight(f"{name}.weight", codes, steps, 0),
                         self.weight(f"{name}.bias", np.rint(bias).astype(np.int32), units, 0), **self.window(branch))

    def summand(self, branch: Branch, values: dict[str, str]) -> str:
        """Compute a branch in float32 [N, H, W, C], not rounded; there its shift is exact, too."""
        name, x = branch.name, values[branch.source]
        if branch.kind == "unchanged":
            return self.dequantized(name, self.transposed(x, f"{name}.rows", [0, 2, 3, 1]))
        if branch.kind != "layer":
            return self.node("Transpose", f"{name}.rows", self.term(branch, values), perm=[0, 2, 3, 1])
        codes, steps, shift = self.layer(branch)
        if branch.window in (None, Window((1, 1))) and getattr(self.model.get_submodule(name), "groups", 1) == 1:
            x = self.transposed(x, f"{name}.rows", [0, 2, 3, 1])
            weight = self.weight(f"{name}.weight", codes.reshape(len(codes), -1).T, steps, 1)
            products = self.node("MatMul", f"{name}.products", self.dequantized(name, x), weight)
        else:  # a convolution of floats would not be exact: it has too many terms
            codes = self.constant(f"{name}.codes", codes.astype(np.int16) + 128, np.uint8)
            acc = self.node("ConvInteger", f"{name}.acc", x, codes, self.grids[x][2],
                            self.constant(f"{name}.zero", 128, np.uint8), **self.window(branch))
            acc = self.node("Transpose", f"{name}.rows", acc, perm=[0, 2, 3, 1])
            acc = self.node("Cast", f"{name}.acc.float", acc, to=self.onnx.TensorProto.FLOAT)
            units = self.constant(f"{name}.units", self.grids[x][0] * steps, np.float32)
            products = self.node("Mul", f"{name}.products", acc, units)
        return self.node("Add", f"{name}.sums", products, self.constant(f"{name}.shift", shift, np.float32))


# ---- onnxruntime ---------------------------------------------------------------------------------

@functools.cache
def saturates() -> bool:
    """Return True if onnxruntime's uint8 x int8 products overflow on this CPU; extreme codes are tried."""
    helper, types = needed("onnx").helper, needed("onnx").TensorProto
    shape, extreme = [64, 64], np.full((64, 64), 127, np.int8)
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "weight"], ["sums"])], "extremes",
                              [helper.make_tensor_value_info("x", types.UINT8, shape)],
                              [helper.make_tensor_value_info("sums", types.INT32, shape)],
                              [needed("onnx").numpy_helper.from_array(extreme, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    engine = needed("onnxruntime").InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sums = engine.run(None, {"x": np.full(shape, 255, np.uint8)})[0]
    return bool((sums != 64 * 255 * 127).any())


def session(model: bytes, threads: int | None = None, **settings):
    """Return an onnxruntime session on the CPU, by default with as many threads as torch has.

    settings: attributes of its SessionOptions.
    """
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")  # uint8 x uint8: exact, at half the speed
    for name, value in settings.items():
        setattr(options, name, value)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def kernels(model: bytes) -> dict[str, int]:
    """Return {operator: how many} of the graph as onnxruntime optimizes it, the most frequent first."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "optimized.onnx"))
        session(model, optimized_model_filepath=path)
        optimized = needed("onnx").load(path)
    return dict(Counter(node.op_type for node in optimized.graph.node).most_common())


def compare(engine, exact: nn.Module, data: cifar100.Images) -> dict:
    """Run an onnxruntime session and the exact network on all images, on every core.

    Returns what tools.agreement counts, and {"differing": [{"image", "label", "engine", "exact", "margin"}]} for
    predictions that differ. margin: the exact logit of the exact prediction minus that of the engine's prediction.
    """
    theirs = answers(lambda batch: torch.from_numpy(engine.run(None, {"image": batch.numpy()})[0]), data.images, BATCH)
    ours = logits(exact, data.images)
    found, wanted = theirs.argmax(1), ours.argmax(1)
    differing = [{"image": i, "label": int(data.labels[i]), "engine": int(found[i]), "exact": int(wanted[i]),
                  "margin": float(ours[i, wanted[i]] - ours[i, found[i]])}
                 for i in (found != wanted).nonzero().flatten().tolist()]
    return agreement(theirs, ours, data.labels) | {"differing": differing}


def text(report: dict) -> str:
    differing = sorted(report["differing"], key=lambda each: -each["margin"])
    lines = [f"  image {each['image']}: label {each['label']}, onnxruntime {each['engine']}, exact_network "
             f"{each['exact']}, whose two logits differ by {each['margin']:.4g}" for each in differing[:20]]
    more = [f"  ... and {len(differing) - 20} with smaller margins"] * (len(differing) > 20)
    return "\n".join(describe("onnxruntime", report) + lines + more)


# ---- The script ----------------------------------------------------------------------------------

def about(checkpoint: Path, claim: dict, graph: Codes) -> dict[str, str]:
    """Return the model's metadata: its source, what the claim says of it, and the bits that int8 does not show."""
    bits = {name: graph.formats.tensors[f"{name}.weight"].bits for name, _ in weight_layers(graph.model)}
    name = checkpoint.name.encode(errors="backslashreplace").decode()  # the name of a file may be no text
    return {"source": name, "source_sha256": sha256(checkpoint),
            "accuracy": json.dumps(claim.get("accuracy")), "weight_bits": json.dumps(bits),
            "commit": str(git_commit())}


def main(argv=None) -> int:
    """Write the model; return 2 if it was run and too few predictions agree."""
    threads.prepare()
    parser = option_parser(__doc__)
    parser.add_argument("--out", type=some_path, metavar="F.onnx",
                        help="file to write (default: the checkpoint's name with the suffix .onnx)")
    parser.add_argument("--verify", action="store_true",
                        help="run the model in onnxruntime on the test set and compare it with exact_network")
    args = parser.parse_args(argv)
    checkpoint = args.checkpoint
    out = args.out or checkpoint.with_suffix(".onnx")
    check_outputs([out], [checkpoint, claims.claim_path(checkpoint)], suffix=".onnx")
    verify = args.verify or args.record
    if verify:
        needed("onnxruntime")  # before any work
    if args.record:
        claims.recordable(checkpoint)
    model, claim = checkpoints.load(checkpoint, args.network)
    graph = Codes(model, claim)
    content = graph.finished(about(checkpoint, claim, graph)).SerializeToString()
    with replacing(out) as file:
        file.write(content)
    layers = weight_layers(model)
    narrow = sum(graph.formats.tensors[f"{name}.weight"].bits < 8 for name, _ in layers)
    print(f"{out}: {len(content):,} bytes, opset {OPSET}; {narrow} of {len(layers)} layers have fewer than 8 bits: "
          f"stored as int8, they run at the speed of 8")
    print(f"BatchNorm: {graph.rounded:,} shifts are no whole number of accumulator units and were rounded; "
          f"{graph.turned:,} channels with a negative scale have codes of the other sign, and {graph.kept:,} with a "
          "code -128 have a negative step")
    if not verify:
        return 0

    data, name = datasets.chosen(args, "test", network=model)
    found = kernels(content)
    print("Kernels: " + ", ".join(f"{count} {name}" for name, count in found.items()), flush=True)
    report = compare(session(content), exact_network(model, claim["activations"]), data)
    print(text(report), flush=True)
    if args.record:
        claims.record(checkpoint, "onnx", {
            "data": name, **{key: report[key] for key in ("images", "correct", "agree")},
            "same_logits": report["identical"], "kernels": found,
            "engine": f"onnxruntime {needed('onnxruntime').__version__}"})
    differing = report["images"] - report["agree"]
    if differing > (1 - NOTICED) * report["images"]:
        print(f"export_onnx.py: {differing} of {report['images']} predictions differ from those of exact_network",
              file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_script(main)
