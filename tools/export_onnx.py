"""From the shipped checkpoint to an ONNX model whose convolutions onnxruntime runs with its 8-bit kernels.

    python -m tools.export_onnx             cifar100_mobilenetv2.pt -> cifar100_mobilenetv2.onnx
    python -m tools.export_onnx --verify    and compare its predictions with ours on the test set, and list the kernels
    python -m tools.export_onnx --record    and write that result into the claim beside the checkpoint

Input `image`: pixels, uint8 [N, 3, 32, 32]. Output `logits`: float32 [N, 100]. Standard operators of opset 17 alone,
with QuantizeLinear/DequantizeLinear around every layer; the weights are the stored codes. Any engine can run it in
float; one that fuses them runs integers. What is what:

  image                 step 1/64 and zero point 128: the normalisation is in the numbers
  activations           uint8; unsigned ones have zero point 0, so that the lower clip is the ReLU; signed ones have
                        128: onnxruntime fuses a convolution only if its input and its output have the same type
  BatchNorm's scale a   in the weights' step: step * a for every output channel; a < 0 turns the codes' signs
  BatchNorm's shift     an int32 bias, a whole number of the accumulator's units (input step * weight step * |a|)
  residual sums         before rounding, as we define them: the 1x1 convolutions that are added are matrix products,
                        whose result stays float32; as convolutions, each would be rounded to 8 bits before the sum
  mean of the 4x4 map   a GlobalAveragePool
  linear layer          a matrix product on the pooled 1x1 map, its bias float32

The engine computes in float32 between an accumulator and the next codes, and adds biases to accumulators, as whole
numbers. What quantize.py's scheme "channel" ships is made for that: shifts are whole accumulator units, halves go to
even, and scales have 5 significant bits, so that a product fits a float32's 24 as long as the accumulator has 19 and a
sign, as all have on the test images (ACCOUNT.md). It is no proof, since a residual sum may need more bits, and is then
rounded twice, which shows where it lies that close to a half. It is measured: --verify finds the shipped checkpoint's
logits the same to the last bit, on all test images. The schemes "layer" and "power-of-two" have no freedom to make
their scales short: some shifts are rounded by up to half a unit, which moves few codes, by one; but each code that
moved moves others behind it, and some ten layers on a third of all codes differ, as much as rounding itself stirs them.
--verify says what arrives at the predictions.

No engine here has 6-bit kernels: 6-bit codes are stored in int8 and run at the speed of 8 bits. Zeros cost as much as
any code. x86 CPUs without VNNI add 8-bit products in pairs in 16 bits, which saturate; `session` looks
for that and asks for exact kernels.
"""
import functools
import importlib
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compressed import checkpoints, cifar100, claims, networks, threads
from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import command_line, number, run_script, some_path
from compressed.errors import BadInput
from compressed.evaluation import answers, logits
from compressed.exact_network import RELU6, exact_network, folded, table
from compressed.files import check_outputs, git_commit, replacing, sha256
from compressed.formats import Activation, Formats
from compressed.graph import Branch, Point, Window, read, weight_layers
from compressed.mnet import stated_formats

OPSET, IR_VERSION = 17, 8  # of 2022: old enough for every engine, and nothing newer is needed
BATCH = 32
NOTICED = 0.999  # of the predictions have to agree


def needed(name: str):
    """The module onnx or onnxruntime, imported where it is used: only the export needs them."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # of another version of numpy or protobuf, anything
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise BadInput(f"{name} is not installed: pip install onnx onnxruntime") from error
        raise BadInput(f"{name} does not work here ({type(error).__name__}: {' '.join(str(error).split())[:200]}): "
                       "pip install onnx onnxruntime") from error


# ---------------------------------------------------------------------------------------------- graphs, and the network

class Graph:
    """Nodes and constants under construction. Values are called by their names."""

    def __init__(self, model: nn.Module):
        self.onnx, self.model, self.read = needed("onnx"), model, read(model)
        self.shapes = {point.name: point.shape for point in self.read.points}
        self.nodes, self.constants = [], {}

    def node(self, operator: str, name: str, *inputs: str, **attributes) -> str:
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value, dtype) -> str:
        array = np.ascontiguousarray(value, dtype)
        self.constants[name] = self.onnx.numpy_helper.from_array(array.reshape(np.shape(value)), name)
        return name

    def window(self, name: str) -> dict:
        """Attributes of a convolution."""
        layer = self.model.get_submodule(name)
        return {"kernel_shape": layer.kernel_size, "strides": layer.stride, "pads": layer.padding * 2,
                "group": layer.groups} | ({"dilations": layer.dilation} if layer.dilation != (1, 1) else {})

    def dequantized(self, reader: str, x: str) -> str:
        """The float32 values of x, for a reader of this name."""
        return x

    def term(self, branch: Branch, values: dict[str, str]) -> str:
        """The float32 value [N, C, H, W] of a branch that is no layer."""
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
        window, whole = branch.window, branch.window.kernel == self.shapes[branch.source][1:]
        if branch.kind == "mean" and whole:
            return self.node("GlobalAveragePool", f"{name}.sums", x)
        return self.node("AveragePool" if branch.kind == "mean" else "MaxPool", f"{name}.sums", x,
                         kernel_shape=window.kernel, strides=window.stride, pads=window.padding * 2,
                         **({"dilations": window.dilation} if branch.kind == "max" else {}))

    def moved(self, branch: Branch, x: str) -> str:
        """The elements of x at other places: gathered from the flattened map, with a zero put before it."""
        name, shape = branch.name, [*branch.index.shape, 1, 1][:3]
        flat = self.node("Flatten", f"{name}.flat", x)
        padded = self.node("Pad", f"{name}.padded", flat, self.constant(f"{name}.pads", [0, 1, 0, 0], np.int64))
        places = self.constant(f"{name}.places", branch.index.flatten().numpy(), np.int64)
        gathered = self.node("Gather", f"{name}.gathered", padded, places, axis=1)
        return self.node("Reshape", f"{name}.sums", gathered, self.constant(f"{name}.shape", [-1, *shape], np.int64))

    def finished(self, about: dict[str, str]):
        """The checked ModelProto. about: its metadata."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        network(self)
        image = helper.make_tensor_value_info("image", types.UINT8, ["N", 3, IMAGE_SIZE, IMAGE_SIZE])
        logits = helper.make_tensor_value_info("logits", types.FLOAT, ["N", *self.shapes["logits"]])
        graph = helper.make_graph(self.nodes, "mobilenet_v2", [image], [logits], list(self.constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
                                  producer_name="export_onnx.py")
        helper.set_model_props(model, about)
        self.onnx.checker.check_model(model, full_check=True)
        return model


def network(graph: "Floats | Codes") -> None:
    """Build the model point by point. Layers come with their BatchNorm; values are maps [N, C, H, W], also of 1x1."""
    values = {}
    for point in graph.read.points:
        first, *others = point.branches
        if first.kind == "pixels":
            values[point.name] = graph.image(point)
        elif point.name == "logits":
            graph.node("Flatten", "logits", graph.sums(point, values))
        elif others or first.kind == "layer" and isinstance(graph.model.get_submodule(first.name), nn.Linear):
            values[point.name] = graph.sum(point, values)
        elif first.kind == "function":
            values[point.name] = graph.function(point, values[first.source])
        elif first.kind == "layer":
            values[point.name] = graph.point(point, graph.convolution(first, values[first.source]))
        else:
            values[point.name] = graph.point(point, graph.term(first, values))


class Floats(Graph):
    """The network in float32, its BatchNorms folded into the convolutions: what 8 bits are compared with for speed."""

    def image(self, point: Point) -> str:
        return self.node("DequantizeLinear", "image.normalised", "image",
                         self.constant("image.step", 1 / cifar100.STD, np.float32),
                         self.constant("image.zero", cifar100.MEAN, np.uint8))

    def convolution(self, branch: Branch, x: str) -> str:
        name, layer = branch.name, self.model.get_submodule(branch.name)
        scale = torch.ones(len(layer.weight))
        shift = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
        if branch.norm:
            scale, constant = folded(self.model.get_submodule(branch.norm))
            shift = constant + scale * shift.detach()
        weight = layer.weight.detach().double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
        weight = self.constant(f"{name}.weight", weight.numpy(), np.float32)
        bias = self.constant(f"{name}.bias", shift.detach().numpy(), np.float32)
        if isinstance(layer, nn.Linear):
            return self.node("Gemm", f"{name}.sums", self.node("Flatten", f"{name}.input", x), weight, bias, transB=1)
        return self.node("Conv", f"{name}.sums", x, weight, bias, **self.window(name))

    def sums(self, point: Point, values: dict[str, str]) -> str:
        """The sum of a point's branches."""
        first, *others = [self.convolution(each, values[each.source]) if each.kind == "layer"
                          else self.term(each, values) for each in point.branches]
        for i, other in enumerate(others):
            first = self.node("Add", f"{point.name}.sums" + f".{i}" * (i > 0), first, other)
        return first

    def sum(self, point: Point, values: dict[str, str]) -> str:
        return self.point(point, self.sums(point, values))

    def point(self, point: Point, x: str) -> str:
        if point.activation == "relu6":
            limits = [self.constant(f"{point.name}.{end}", end, np.float32) for end in (0, 6)]
            return self.node("Clip", point.name, x, *limits)
        return self.node("Relu", point.name, x) if point.activation == "relu" else x

    def function(self, point: Point, x: str) -> str:
        operator, *alpha = {"hardswish": ["HardSwish"], "hardsigmoid": ["HardSigmoid", 1 / 6],
                            "sigmoid": ["Sigmoid"]}[point.branches[0].function]
        return self.node(operator, point.name, x, **dict(zip(["alpha"], alpha)))


class Codes(Graph):
    """The network in codes: between two layers there are uint8 values, and each layer dequantizes what it reads.

    grids: (step, names of the constants step and zero point) of each uint8 value.
    turned: output channels with a negative scale whose codes changed sign; kept: those where a code -128 forbids it, so
    that their weight step is negative. rounded: shifts that are no whole number of accumulator units.
    Raises BadInput if the formats are not what 8-bit kernels have.
    """

    def __init__(self, model: nn.Module, claim: dict):
        super().__init__(model)
        self.formats: Formats = stated_formats(model, claim)
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
        """Names of step and zero point of an activation point, whose codes are called `value`."""
        zero = 128 if self.formats.activations[name].signed else 0
        self.grids[value] = (self.steps[name], self.constant(f"{name}.step", self.steps[name], np.float32),
                             self.constant(f"{name}.zero", zero, np.uint8))
        return self.grids[value][1:]

    def dequantized(self, reader: str, x: str) -> str:
        return self.node("DequantizeLinear", f"{reader}.input", x, *self.grids[x][1:])

    def transposed(self, x: str, name: str, order: list[int]) -> str:
        """The codes x in another order of axes. onnxruntime's own order is NHWC: all of these cancel out."""
        self.grids[name] = self.grids[x]
        return self.node("Transpose", name, x, perm=order)

    def point(self, point: Point, x: str, value: str | None = None) -> str:
        """The codes of a point's float32 value, called `value`; fewer than 8 bits, and the upper clip of a ReLU6, are a
        clip of codes."""
        value, activation = value or point.name, self.formats.activations[point.name]
        high = min(round(RELU6 / self.steps[point.name]), activation.high) if point.activation == "relu6" else \
            activation.high
        low, high = (code + 128 * activation.signed for code in (activation.low, high))
        if (low, high) == (0, 255):
            return self.node("QuantizeLinear", value, x, *self.grid(point.name, value))
        codes = self.node("QuantizeLinear", f"{value}.whole", x, *self.grid(point.name, value))
        limits = (self.constant(f"{value}.{end}", code, np.uint8) for end, code in (("low", low), ("high", high)))
        return self.node("Clip", value, codes, *limits)

    def image(self, point: Point) -> str:
        self.grid(point.name, "image")
        return "image"

    def function(self, point: Point, x: str) -> str:
        """A pointwise function of codes: a table of 256."""
        name, branch = point.name, point.branches[0]
        source, target = (self.formats.activations[each] for each in (branch.source, name))
        source = Activation(8, source.signed)  # codes that fewer bits do not have are never looked up
        entries = table(branch.function, source, self.steps[branch.source], target, self.steps[name]).numpy()
        entries = self.constant(f"{name}.table", entries + 128 * target.signed, np.uint8)
        index = self.node("Cast", f"{name}.index", x, to=self.onnx.TensorProto.INT32)
        self.grid(name, name)
        return self.node("Gather", name, entries, index)

    # -- layers

    def values(self, name: str, norm: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(codes int8 in the weight's shape, step of each output channel, shift of each), float64; exact."""
        layer, grid = self.model.get_submodule(name), self.formats.tensors[f"{name}.weight"]
        codes, steps = grid.codes(layer.weight).numpy(), np.full(len(layer.weight), grid.steps[0])
        if norm is None:
            bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
            return codes.astype(np.int8), steps, bias.double().numpy()
        bn = self.model.get_submodule(norm)
        scale, shift = bn.weight.detach().double().numpy(), bn.bias.detach().double().numpy()
        steps = steps * scale
        codes[scale == 0] = 0
        steps[scale == 0] = 2.0**-12 * max(self.steps.values())  # nothing is summed: fine enough for any shift
        rows = codes.reshape(len(codes), -1)
        turn = (scale < 0) & (rows.min(1) > -128)
        codes[turn], steps[turn] = -codes[turn], -steps[turn]
        self.turned, self.kept = self.turned + int(turn.sum()), self.kept + int((steps < 0).sum())
        return codes.astype(np.int8), steps, shift

    def weight(self, name: str, codes: np.ndarray, steps: np.ndarray, axis: int) -> str:
        """Dequantized codes (or int32 biases), a step for every index of the axis."""
        return self.node("DequantizeLinear", name, self.constant(f"{name}.codes", codes, codes.dtype),
                         self.constant(f"{name}.steps", steps, np.float32), axis=axis)

    def convolution(self, branch: Branch, x: str) -> str:
        """A convolution that is rounded as it is: onnxruntime fuses it with its neighbours to a QLinearConv."""
        name = branch.name
        codes, steps, shift = self.values(name, branch.norm)
        units = self.grids[x][0] * steps
        bias = shift / units
        reach = 255 * np.abs(codes.reshape(len(codes), -1).astype(np.int64)).sum(1) + np.abs(bias)
        if reach.max() >= 2**31:
            raise BadInput(f"{name}: a shift of {np.abs(bias[reach.argmax()]):.3g} units does not fit 32 bits")
        self.rounded += int((bias != np.rint(bias)).sum())
        return self.node("Conv", f"{name}.sums", self.dequantized(name, x),
                         self.weight(f"{name}.weight", codes, steps, 0),
                         self.weight(f"{name}.bias", np.rint(bias).astype(np.int32), units, 0), **self.window(name))

    def rows(self, branch: Branch, values: dict[str, str]) -> str:
        """The float32 value [N, H, W, C] of a branch, not rounded; in float32 its shift is exact, too."""
        name, x = branch.name, values[branch.source]
        if branch.kind == "unchanged":
            return self.dequantized(name, self.transposed(x, f"{name}.rows", [0, 2, 3, 1]))
        if branch.kind != "layer":
            return self.node("Transpose", f"{name}.rows", self.term(branch, values), perm=[0, 2, 3, 1])
        codes, steps, shift = self.values(name, branch.norm)
        if branch.window in (None, Window((1, 1))) and getattr(self.model.get_submodule(name), "groups", 1) == 1:
            x = self.transposed(x, f"{name}.rows", [0, 2, 3, 1])
            weight = self.weight(f"{name}.weight", codes.reshape(len(codes), -1).T, steps, 1)
            products = self.node("MatMul", f"{name}.products", self.dequantized(name, x), weight)
        else:  # as a convolution of floats it would not be exact: its terms are too many
            codes = self.constant(f"{name}.codes", codes.astype(np.int16) + 128, np.uint8)
            acc = self.node("ConvInteger", f"{name}.acc", x, codes, self.grids[x][2],
                            self.constant(f"{name}.zero", 128, np.uint8), **self.window(name))
            acc = self.node("Transpose", f"{name}.rows", acc, perm=[0, 2, 3, 1])
            acc = self.node("Cast", f"{name}.acc.float", acc, to=self.onnx.TensorProto.FLOAT)
            units = self.constant(f"{name}.units", self.grids[x][0] * steps, np.float32)
            products = self.node("Mul", f"{name}.products", acc, units)
        return self.node("Add", f"{name}.sums", products, self.constant(f"{name}.shift", shift, np.float32))

    def sums(self, point: Point, values: dict[str, str]) -> str:
        """The sum [N, H, W, C] of a point's branches in float32."""
        first, *others = [self.rows(branch, values) for branch in point.branches]
        for i, other in enumerate(others):
            first = self.node("Add", f"{point.name}.sums" + f".{i}" * (i > 0), first, other)
        return first

    def sum(self, point: Point, values: dict[str, str]) -> str:
        codes = self.point(point, self.sums(point, values), f"{point.name}.codes")
        return self.transposed(codes, point.name, [0, 3, 1, 2])


def about(checkpoint: Path, claim: dict, graph: Codes) -> dict[str, str]:
    """The metadata: where the model comes from, what is claimed of it, and what its tensors do not show."""
    bits = {name: graph.formats.tensors[f"{name}.weight"].bits for name, _ in weight_layers(graph.model)}
    name = checkpoint.name.encode(errors="backslashreplace").decode()  # the name of a file may be no text
    return {"source": name, "source_sha256": sha256(checkpoint),
            "accuracy": json.dumps(claim.get("accuracy")), "weight_bits": json.dumps(bits),
            "commit": str(git_commit())}


# ----------------------------------------------------------------------------------------------------------- the engine

@functools.cache
def saturates() -> bool:
    """Whether the engine's uint8 x int8 products overflow on this CPU: their extremes show it."""
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
    """An onnxruntime session on the CPU, by default with as many threads as torch. settings: of its SessionOptions."""
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
    """The operators that are left once onnxruntime has optimized the graph, the most frequent first."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "optimized.onnx"))
        session(model, optimized_model_filepath=path)
        optimized = needed("onnx").load(path)
    return dict(Counter(node.op_type for node in optimized.graph.node).most_common())


def compare(engine, exact: nn.Module, data: cifar100.Images) -> dict:
    """Both on every core: {"images", "correct", "exact_correct", "same_logits",
     "differing": [{"image", "label", "engine", "exact", "margin"}]}

    margin: by how much the exact logits prefer their own prediction to the engine's.
    """
    theirs = answers(lambda batch: torch.from_numpy(engine.run(None, {"image": batch.numpy()})[0]), data.images, BATCH)
    ours = logits(exact, data.images)
    found, wanted = theirs.argmax(1), ours.argmax(1)
    differing = [{"image": i, "label": int(data.labels[i]), "engine": int(found[i]), "exact": int(wanted[i]),
                  "margin": float(ours[i, wanted[i]] - ours[i, found[i]])}
                 for i in (found != wanted).nonzero().flatten().tolist()]
    return {"images": len(data), "correct": int((found == data.labels).sum()),
            "exact_correct": int((wanted == data.labels).sum()),
            "same_logits": int((theirs == ours).all(1).sum()), "differing": differing}


# ----------------------------------------------------------------------------------------------------------- the script

def text(report: dict) -> str:
    n, differing = report["images"], report["differing"]
    lines = [f"Accuracy in onnxruntime: {report['correct']}/{n} ({report['correct'] / n:.2%}); ours, exact: "
             f"{report['exact_correct']}/{n} ({report['exact_correct'] / n:.2%})",
             f"Predictions agree on {n - len(differing)}/{n} ({1 - len(differing) / n:.2%}); all logits are the same, "
             f"to the last bit, on {report['same_logits']}"]
    for each in sorted(differing, key=lambda each: -each["margin"])[:20]:
        lines.append(f"  image {each['image']}: label {each['label']}, onnxruntime {each['engine']}, exact "
                     f"{each['exact']}; the two exact logits are {each['margin']:.4g} apart")
    return "\n".join(lines + [f"  ... and {len(differing) - 20} with smaller margins"] * (len(differing) > 20))


def main(argv=None) -> int:
    """Returns 2 if too few predictions agree."""
    threads.prepare()
    parser = command_line(__doc__)
    checkpoints.add_option(parser)
    networks.add_option(parser, claimed=True)
    cifar100.add_options(parser)
    parser.add_argument("--out", type=some_path, metavar="F.onnx",
                        help="what is written (default: the checkpoint's name)")
    parser.add_argument("--verify", action="store_true",
                        help="run it in onnxruntime on the test set, beside exact_network")
    parser.add_argument("--record", action="store_true", help="--verify, and write the result into the claim")
    parser.add_argument("--images", type=number(int, 1, 10**6), metavar="N", help=cifar100.FIRST_IMAGES)
    args = parser.parse_args(argv)
    checkpoint = args.checkpoint
    out = args.out or checkpoint.with_suffix(".onnx")
    check_outputs([out], [checkpoint, claims.claim_path(checkpoint)], suffix=".onnx")
    verify = args.verify or args.record
    if verify:
        needed("onnxruntime")  # before anything is done
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
          f"stored in int8, they run at the speed of 8")
    print(f"{graph.rounded:,} BatchNorm shifts are no whole number of accumulator units and were rounded; "
          f"{graph.turned:,} channels with a negative scale have their codes turned, {graph.kept:,} with a code -128 "
          "keep a negative step")
    if not verify:
        return 0

    data, name = cifar100.chosen(args, "test")
    content = out.read_bytes()
    found = kernels(content)
    print("Kernels: " + ", ".join(f"{count} {name}" for name, count in found.items()), flush=True)
    report = compare(session(content), exact_network(model, claim["activations"]), data)
    print(text(report), flush=True)
    differing, n = len(report["differing"]), report["images"]
    if args.record:
        record = {"data": name, "images": n, "correct": report["correct"],
                  "agree": n - differing, "same_logits": report["same_logits"], "kernels": found,
                  "engine": f"onnxruntime {needed('onnxruntime').__version__}"}
        claims.record(checkpoint, "onnx", record)
    if differing > (1 - NOTICED) * n:
        print(f"export_onnx.py: {differing} of {n} predictions differ from ours", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_script(main)
