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
"channel") is made for that: shifts are whole units of the accumulator, and scales have 5 significant bits, so that
products with accumulators of up to 19 bits and a sign are exact. All accumulators are that small on the test images
(ACCOUNT.md), but a residual sum may need more bits: --verify compares. The other schemes cannot have short scales: some
shifts are rounded, which changes few codes by one, but after some ten layers a third of all codes differ.

onnxruntime has no 6-bit kernels: 6-bit codes run at the speed of 8 bits. Zeros cost as much as any code. x86 CPUs
without VNNI add 8-bit products in pairs in 16 bits, which saturate; `session` detects that and asks for exact kernels.
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
from compressed.command_line import needed, run_script, some_file
from compressed.errors import BadInput
from compressed.evaluation import in_batches, logits
from compressed.exact_network import exact_network, table
from compressed.files import check_outputs, git_commit, replacing, sha256
from compressed.formats import Activation
from compressed.graph import Branch, Window, read_graph, weight_layers
from compressed.integer_network import IntegerNetwork, Term, Value
from tools.agreement import agreement, describe, option_parser

OPSET, IR_VERSION = 17, 8  # of 2022: old enough for every engine
BATCH = 32
NOTICED = 0.999  # share of the predictions that must agree
ROWS, MAPS = (0, 2, 3, 1), (0, 3, 1, 2)  # transpositions to [N, H, W, C] and back


# ---- The ONNX graph ------------------------------------------------------------------------------

class Exporter:
    """Write an integer network as an ONNX model: between layers there are uint8 codes, and each layer dequantizes them.

    ONNX values are represented by their names. They are maps [N, C, H, W]; features after pooling are maps of 1x1.
    rounded: how many shifts are no whole number of accumulator units.
    """

    def __init__(self, model: nn.Module, claim: dict):
        self.onnx, self.network = needed("onnx"), IntegerNetwork(model, claim)
        self.steps, self.signed = self.network.steps, read_graph(model).activation_points
        self.shapes = {value.point.name: value.point.shape for value in self.network.values}
        self.nodes, self.constants = [], {}
        self.codes = {}  # of each activation point: the name of the ONNX value
        self.rounded = 0

    def node(self, operator: str, name: str, *inputs: str, **attributes) -> str:
        """Add a node; return the name of its output, which is the node's."""
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value, dtype) -> str:
        self.constants[name] = self.onnx.numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    # -- codes and real numbers

    def grid(self, point: str) -> tuple[str, str]:
        """Return the names of the constants that hold step and zero point of an activation point."""
        return (self.constant(f"{point}.step", self.steps[point], np.float32),
                self.constant(f"{point}.zero", 128 * self.signed[point], np.uint8))

    def dequantized(self, reader: str, point: str, codes: str | None = None) -> str:
        """Dequantize the codes of a point, or the same codes transposed, for a node with the name `reader`."""
        return self.node("DequantizeLinear", f"{reader}.input", codes or self.codes[point], *self.grid(point))

    def rows(self, branch: Branch) -> str:
        """Transpose the codes that a branch reads. onnxruntime computes in NHWC: these transpositions cancel out."""
        return self.node("Transpose", f"{branch.name}.rows", self.codes[branch.source], perm=ROWS)

    def weight(self, name: str, codes: np.ndarray, steps: np.ndarray, axis: int) -> str:
        """Dequantize constant codes (weights, or int32 biases) with a step for every index of the axis."""
        return self.node("DequantizeLinear", name, self.constant(f"{name}.codes", codes, codes.dtype),
                         self.constant(f"{name}.steps", steps, np.float32), axis=axis)

    def quantized(self, value: Value, x: str, name: str) -> str:
        """Round the float32 value x to codes with the name `name`.

        Fewer than 8 bits, and the upper clip of a ReLU6, are a clip of codes.
        """
        point = value.point.name
        ends = [code + 128 * self.signed[point] for code in (value.low, value.high)]
        if ends == [0, 255]:
            return self.node("QuantizeLinear", name, x, *self.grid(point))
        codes = self.node("QuantizeLinear", f"{name}.whole", x, *self.grid(point))
        limits = (self.constant(f"{name}.{end}", code, np.uint8) for end, code in zip(("low", "high"), ends))
        return self.node("Clip", name, codes, *limits)

    # -- values

    def value(self, value: Value) -> str:
        """Compute the codes of a value."""
        name, (first, *others) = value.point.name, value.terms
        if first.branch.kind == "pixels":
            step, bits = self.steps[name], self.network.formats.activations[name].bits
            if value.point.activation != "none":
                raise BadInput(f"{name} clips the image before any layer, which has no ONNX model here")
            if step != 1 / cifar100.STD or bits != 8:
                raise BadInput(f"the image has {bits} bits and the step {step}: expected 8, and 1/{cifar100.STD}, the "
                               "pixels' own")
            return "image"
        if first.branch.kind == "function":
            return self.function(value)
        layer = first.branch.kind == "layer"
        if others or layer and first.branch.window is None:  # a sum, or a linear layer
            return self.node("Transpose", name, self.quantized(value, self.sums(value), f"{name}.codes"), perm=MAPS)
        return self.quantized(value, self.convolution(first) if layer else self.term(first), name)

    def function(self, value: Value) -> str:
        """Look up a pointwise function of codes in a table of 256."""
        name, branch = value.point.name, value.terms[0].branch
        source = Activation(8, self.signed[branch.source])  # codes that fewer bits do not have are never looked up
        entries = table(branch.function, source, self.steps[branch.source], self.network.formats.activations[name],
                        self.steps[name])
        entries = self.constant(f"{name}.table", entries.numpy() + 128 * self.signed[name], np.uint8)
        index = self.node("Cast", f"{name}.index", self.codes[branch.source], to=self.onnx.TensorProto.INT32)
        return self.node("Gather", name, entries, index)

    def sums(self, value: Value) -> str:
        """Add up a value's terms in float32 [N, H, W, C]."""
        first, *others = map(self.summand, value.terms)
        for i, other in enumerate(others):
            first = self.node("Add", f"{value.point.name}.sums" + f".{i}" * (i > 0), first, other)
        return first

    # -- terms

    def weight_steps(self, term: Term) -> np.ndarray:
        """Return the scale of each channel, float64, without the step of the codes that the term reads."""
        return term.scale.numpy() / self.steps[term.branch.source]

    def term(self, term: Term) -> str:
        """Compute a term that is no layer, in float32 [N, C, H, W]."""
        branch, name, window = term.branch, term.branch.name, term.branch.window
        x = self.dequantized(name, branch.source)
        if branch.kind == "unchanged":
            return x
        if branch.kind == "norm":
            scale, shift = (part[:, None, None] for part in (self.weight_steps(term), term.shift.numpy()))
            scaled = self.node("Mul", f"{name}.scaled", x, self.constant(f"{name}.scale", scale, np.float32))
            return self.node("Add", f"{name}.sums", scaled, self.constant(f"{name}.shift", shift, np.float32))
        if branch.kind == "product":
            return self.node("Mul", f"{name}.products", x, self.dequantized(f"{name}.factor", branch.other))
        if branch.kind == "moved":
            return self.moved(branch, x)
        if branch.kind == "mean" and window.kernel == self.shapes[branch.source][1:]:
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

    def window(self, branch: Branch) -> dict:
        """Return the attributes of a convolution or a pooling."""
        window = branch.window
        found = {"kernel_shape": window.kernel, "strides": window.stride, "pads": window.padding * 2}
        if window.dilation != (1, 1):
            found["dilations"] = window.dilation
        return found | ({"group": self.groups(branch)} if branch.kind == "layer" else {})

    def groups(self, branch: Branch) -> int:
        return self.network.model.get_submodule(branch.name).groups

    def layer(self, term: Term) -> tuple[np.ndarray, np.ndarray]:
        """Return (codes int8 in the weight's shape, step of each output channel: float64) of a layer.

        A step is above 0, unless the channel has a code -128, which has no opposite.
        """
        codes, steps = term.codes.numpy().copy(), self.weight_steps(term)
        codes[steps == 0] = 0
        steps[steps == 0] = 2.0**-12 * max(self.steps.values())  # nothing is summed: fine enough for any shift
        turn = (steps < 0) & (codes.reshape(len(codes), -1).min(1) > -128)
        codes[turn], steps[turn] = -codes[turn], -steps[turn]
        return codes.astype(np.int8), steps

    def convolution(self, term: Term) -> str:
        """Compute a convolution whose result is rounded: onnxruntime fuses it with its neighbours to a QLinearConv."""
        branch, name = term.branch, term.branch.name
        codes, steps = self.layer(term)
        units = self.steps[branch.source] * steps
        bias = term.shift.numpy() / units
        most = np.abs(bias) + [max(-low, high) for low, high in term.reach]
        if most.max() >= 2**31:
            raise BadInput(f"{name}: a shift of {np.abs(bias[most.argmax()]):.3g} units does not fit 32 bits")
        self.rounded += int((bias != np.rint(bias)).sum())
        return self.node("Conv", f"{name}.sums", self.dequantized(name, branch.source),
                         self.weight(f"{name}.weight", codes, steps, 0),
                         self.weight(f"{name}.bias", np.rint(bias).astype(np.int32), units, 0), **self.window(branch))

    def summand(self, term: Term) -> str:
        """Compute a term in float32 [N, H, W, C], not rounded; there its shift is exact, too."""
        branch, name = term.branch, term.branch.name
        if branch.kind == "unchanged":
            return self.dequantized(name, branch.source, self.rows(branch))
        if branch.kind != "layer":
            return self.node("Transpose", f"{name}.rows", self.term(term), perm=ROWS)
        codes, steps = self.layer(term)
        if branch.window is None or branch.window == Window((1, 1)) and self.groups(branch) == 1:
            x = self.dequantized(name, branch.source, self.rows(branch))
            weight = self.weight(f"{name}.weight", codes.reshape(len(codes), -1).T, steps, 1)
            products = self.node("MatMul", f"{name}.products", x, weight)
        else:  # a convolution of floats would not be exact: it has too many terms
            codes = self.constant(f"{name}.codes", codes.astype(np.int16) + 128, np.uint8)
            acc = self.node("ConvInteger", f"{name}.acc", self.codes[branch.source], codes, self.grid(branch.source)[1],
                            self.constant(f"{name}.zero", 128, np.uint8), **self.window(branch))
            acc = self.node("Transpose", f"{name}.rows", acc, perm=ROWS)
            acc = self.node("Cast", f"{name}.acc.float", acc, to=self.onnx.TensorProto.FLOAT)
            units = self.constant(f"{name}.units", self.steps[branch.source] * steps, np.float32)
            products = self.node("Mul", f"{name}.products", acc, units)
        shift = self.constant(f"{name}.shift", term.shift.numpy(), np.float32)
        return self.node("Add", f"{name}.sums", products, shift)

    def finished(self, about: dict[str, str]):
        """Build all values; return the checked ModelProto. about: its metadata."""
        network, helper, types = self.network, self.onnx.helper, self.onnx.TensorProto
        for value in network.values:
            self.codes[value.point.name] = self.value(value)
        self.node("Flatten", "logits", self.sums(network.logits))
        image = helper.make_tensor_value_info("image", types.UINT8, ["N", 3, IMAGE_SIZE, IMAGE_SIZE])
        logits = helper.make_tensor_value_info("logits", types.FLOAT, ["N", *network.logits.point.shape])
        graph = helper.make_graph(self.nodes, "mobilenet_v2", [image], [logits], list(self.constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
                                  producer_name="export_onnx.py")
        helper.set_model_props(model, about)
        self.onnx.checker.check_model(model, full_check=True)
        return model


# ---- onnxruntime ---------------------------------------------------------------------------------

@functools.cache
def saturates() -> bool:
    """Return True if onnxruntime's uint8 x int8 products overflow on this CPU; extreme codes are tried."""
    model = needed("onnx").parser.parse_model(f"""<ir_version: {IR_VERSION}, opset_import: ["": {OPSET}]>
        extremes (uint8[64, 64] x) => (int32[64, 64] sums)
        <int8[64, 64] weight = {{{", ".join(["127"] * 64 * 64)}}}> {{ sums = MatMulInteger(x, weight) }}""")
    engine = needed("onnxruntime").InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool((engine.run(None, {"x": np.full((64, 64), 255, np.uint8)})[0] != 64 * 255 * 127).any())


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


def run(engine, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of uint8 images from an onnxruntime session."""
    return torch.from_numpy(engine.run(None, {"image": images.numpy()})[0])


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
    theirs = in_batches(functools.partial(run, engine), data.images, BATCH)
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

def about(checkpoint: Path, claim: dict, network: IntegerNetwork) -> dict[str, str]:
    """Return the model's metadata: its source, what the claim says of it, and the bits that int8 does not show."""
    bits = {name: network.formats.tensors[f"{name}.weight"].bits for name, _ in weight_layers(network.model)}
    name = checkpoint.name.encode(errors="backslashreplace").decode()  # the name of a file may be no text
    return {"source": name, "source_sha256": sha256(checkpoint),
            "accuracy": json.dumps(claim.get("accuracy")), "weight_bits": json.dumps(bits),
            "commit": str(git_commit())}


def main(argv=None) -> int:
    """Write the model; return 2 if it was run and too few predictions agree."""
    threads.prepare()
    parser = option_parser(__doc__)
    parser.add_argument("--out", type=some_file, metavar="F.onnx",
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
    exporter = Exporter(model, claim)
    content = exporter.finished(about(checkpoint, claim, exporter.network)).SerializeToString()
    with replacing(out) as file:
        file.write(content)
    layers = weight_layers(model)
    narrow = sum(exporter.network.formats.tensors[f"{name}.weight"].bits < 8 for name, _ in layers)
    print(f"{out}: {len(content):,} bytes, opset {OPSET}; {narrow} of {len(layers)} layers have fewer than 8 bits: "
          f"stored as int8, they run at the speed of 8\nBatchNorm: {exporter.rounded:,} shifts are no whole number of "
          "accumulator units and were rounded")
    if not verify:
        return 0

    data, name = datasets.chosen(args, "test", network=model, most=args.images)
    if args.record:
        datasets.check_same(data.data_set, claim.get("data_set"), checkpoint)
    found = kernels(content)
    print("Kernels: " + ", ".join(f"{count} {name}" for name, count in found.items()), flush=True)
    report = compare(session(content), exact_network(model, claim["activations"]), data)
    print(text(report), flush=True)
    if args.record:
        claims.record(checkpoint, "onnx", {
            "data": name, **{key: report[key] for key in ("images", "correct", "agree")},
            "same_logits": report["identical"], "kernels": found,
            "engine": f"onnxruntime {needed('onnxruntime').__version__}"}, claim)
    differing = report["images"] - report["agree"]
    if differing > (1 - NOTICED) * report["images"]:
        print(f"export_onnx.py: {differing} of {report['images']} predictions differ from those of exact_network",
              file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_script(main)
