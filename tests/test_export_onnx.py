import copy
import json
import shutil
import sys

import numpy as np
import pytest
import torch

import quantize
from compressed import checkpoints, cifar100, claims
from compressed.errors import BadInput
from compressed.exact_network import exact_network
from compressed.files import load_json, save_record, save_tensors, sha256
from compressed.graph import read_graph, weight_layers
from compressed.networks import load_state
from small import NARROW, SPEC
from tools import tables

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tools import export_onnx
from tools.export_onnx import Exporter, main, session


@pytest.fixture(scope="module")
def checkpoint(narrow, tmp_path_factory):
    path = tmp_path_factory.mktemp("shipped") / "small.pt"
    shutil.copy(narrow[0], path)
    save_record(narrow[2] | {"accuracy": {"data": "made up", "correct": 0, "images": 100, "loss": 0.0}},
                claims.claim_path(path))
    return path


@pytest.fixture(scope="module")
def shipped(narrow):
    return narrow[1:]


@pytest.fixture(scope="module")
def long_scales(exact):
    """(model, claim) of a scheme whose scales have 11 significant bits."""
    network, tensors, activations, _ = exact["layer"]
    return network, {"tensors": tensors, "activations": activations}


@pytest.fixture(scope="module")
def exported(shipped):
    """(the graph's builder, the ONNX model)."""
    graph = Exporter(*shipped)
    return graph, graph.finished({})


# --------------------------------------------------------------------------------------------------------- the graph

def test_every_product_reads_codes_of_8_bits(exported):
    _, model = exported
    made_by = {output: node for node in model.graph.node for output in node.output}
    constants = {constant.name: onnx.numpy_helper.to_array(constant) for constant in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    assert len(products) == 58
    for node in products:
        x, weight, *bias = (made_by[name] for name in node.input)
        assert {x.op_type, weight.op_type} == {"DequantizeLinear"}
        assert constants[weight.input[0]].dtype == np.int8
        assert constants[x.input[1]].shape == () and constants[x.input[2]].dtype == np.uint8
        for each in bias:  # on the units of the accumulator, or onnxruntime could not fuse it
            assert constants[each.input[0]].dtype == np.int32
            assert np.array_equal(constants[each.input[1]], constants[x.input[1]] * constants[weight.input[1]])
    rounding = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounding) == 54  # the image is already on its grid
    assert {constants[node.input[2]].dtype for node in rounding} == {np.dtype(np.uint8)}
    assert {node.domain for node in model.graph.node} == {""} and model.opset_import[0].version == 17
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_codes_are_the_stored_ones_and_their_steps_hold_the_batchnorm(exported, shipped):
    graph, onnx_model = exported
    model, claim = shipped
    constants = {constant.name: onnx.numpy_helper.to_array(constant) for constant in onnx_model.graph.initializer}
    steps = {entry["name"]: entry.get("step") for entry in claim["tensors"]}
    norms = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "shortcut.0": "shortcut.1"}
    negative = 0
    for name, layer in weight_layers(model):
        stored = (layer.weight.detach().double() / steps[f"{name}.weight"]).numpy().reshape(len(layer.weight), -1)
        codes = constants[f"{name}.weight.codes"].astype(np.float64)
        codes = codes.T if codes.ndim == 2 else codes.reshape(len(codes), -1)
        scale = np.ones(len(stored))
        if name != "linear":
            key = next(key for key in norms if name == key or name.endswith("." + key))
            scale = model.get_submodule(name.removesuffix(key) + norms[key]).weight.detach().double().numpy()
        assert np.array_equal(np.abs(codes), np.abs(stored) * (scale != 0)[:, None])
        found = codes * constants[f"{name}.weight.steps"].astype(np.float64)[:, None]
        assert np.array_equal(found, stored * steps[f"{name}.weight"] * scale[:, None])  # exact: float16 x power of two
        kept = constants[f"{name}.weight.steps"] < 0
        assert (codes[kept].min(1) == -128).all() if kept.any() else True
        negative += int(kept.sum())
    assert negative > 10 and graph.rounded == 0


@pytest.mark.parametrize("scheme", ["channel", "layer"])
def test_each_layer_from_our_codes(shipped, long_scales, scheme):
    """Where shifts had to be rounded, a layer that reads our codes is at most one off, and seldom; elsewhere never."""
    model, claim = shipped if scheme == "channel" else long_scales
    graph = Exporter(model, claim)
    onnx_model = graph.finished({})
    assert graph.rounded == 0 if scheme == "channel" else graph.rounded > 500
    signed, codes = read_graph(model).activation_points, {}
    for name, found in graph.network.codes(cifar100.made_up(4, 3).images).items():
        found = (found.int() + 128 * signed.get(name, 0)).to(torch.uint8)
        codes[name] = found.permute(0, 3, 1, 2).contiguous() if found.dim() == 4 else found[:, :, None, None]
    assert torch.equal(codes["image"], codes["pixels"])
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(onnx_model))
    largest = 0
    for point in read_graph(model).points[1:-1]:
        inputs = list(dict.fromkeys(branch.source for branch in point.branches))
        part = extractor.extract_model(inputs, [point.name])
        got = session(part.SerializeToString()).run(None, {name: codes[name].numpy() for name in inputs})[0]
        apart = (torch.from_numpy(got).int() - codes[point.name].int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < (0.03 if scheme == "layer" else 1e-9), point.name
        largest = max(largest, int(apart.max()))
    assert largest == (scheme == "layer")


def test_the_engine_runs_8_bit_kernels(exported):
    found = export_onnx.kernels(exported[1].SerializeToString())
    assert found["QLinearConv"] == 39 and found["QLinearGlobalAveragePool"] == 1 and found["MatMulIntegerToFloat"] == 19
    assert not found.keys() & {"Conv", "FusedConv", "MatMul", "Gemm"}


def test_a_cpu_whose_products_overflow_gets_unsigned_weights(exported, monkeypatch, tmp_path):
    """Two products of a code below 256 and one of up to 64 fit 16 bits; larger weights are stored as uint8."""
    content, images = exported[1].SerializeToString(), cifar100.made_up(8, 5).images
    monkeypatch.setattr(export_onnx, "saturates", lambda: False)
    wanted = export_onnx.run(session(content), images)
    monkeypatch.setattr(export_onnx, "saturates", lambda: True)
    found = export_onnx.run(session(content, optimized_model_filepath=str(tmp_path / "optimized.onnx")), images)
    assert torch.equal(found, wanted)
    weights = [onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "optimized.onnx").graph.initializer
               if len(each.dims) == 4]
    assert {each.dtype for each in weights} == {np.dtype("int8"), np.dtype("uint8")}
    assert all(abs(each.astype(int)).max() <= 64 for each in weights if each.dtype == np.int8)


# -------------------------------------------------------------------------------------------------------- the script

def test_script(checkpoint, tmp_path, capsys, monkeypatch):
    out = tmp_path / "small.onnx"
    assert main(["--checkpoint", str(checkpoint), "--out", str(out), "--verify", "--made-up", "100"]) == 0
    said = capsys.readouterr().out
    for part in ("9 of 58 layers have fewer than 8 bits", "39 QLinearConv",
                 "Same prediction: 100/100 (100.00%) images; same logits to the last bit: 100/100"):
        assert part in said
    properties = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert properties["source_sha256"] == sha256(checkpoint)
    assert json.loads(properties["accuracy"]) == load_json(claims.claim_path(checkpoint))["accuracy"]
    bits = json.loads(properties["weight_bits"])
    assert len(bits) == 58 and list(bits.values()).count(6) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    before = load_json(claims.claim_path(checkpoint))
    assert main(["--checkpoint", str(checkpoint), "--out", str(out), "--record", "--made-up", "100", "--images",
                 "30"]) == 0
    after = load_json(claims.claim_path(checkpoint))
    record = after.pop("onnx")
    assert after.pop("digest") != before.pop("digest")
    assert after == before and record["images"] == record["agree"] == record["same_logits"] == 30
    assert record["data"] == "made up"
    assert record["kernels"]["QLinearConv"] == 39 and record["engine"].startswith("onnxruntime 1.")
    monkeypatch.setattr(export_onnx, "NOTICED", 1.01)
    argv = ["--checkpoint", str(checkpoint), "--out", str(out), "--verify", "--made-up", "100", "--images", "8"]
    assert main(argv) == 2
    assert "of 8 predictions differ from those of" in capsys.readouterr().err


def test_the_shipped_checkpoint_in_onnxruntime(cifar100_dir):
    """On test images, to the last bit; and what the claim recorded of all 10,000."""
    model, claim = checkpoints.load(checkpoints.SHIPPED)
    data = cifar100.load(cifar100_dir, "test")
    data = cifar100.Images(data.images[:300], data.labels[:300])
    engine = session(Exporter(model, claim).finished({}).SerializeToString())
    found = export_onnx.compare(engine, exact_network(model, claim["activations"]), data)
    assert found["identical"] == 300 and found["differing"] == []
    assert claim["onnx"]["data"] == "test" and claim["onnx"]["images"] == claim["onnx"]["same_logits"] == 10_000
    assert claim["onnx"]["correct"] == claim["accuracy"]["correct"] == claim["integer"]["correct"]


def test_comparison_counts():
    """An engine that swaps two classes is caught on exactly the images that have one of them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 4, 4), generator=generator, dtype=torch.uint8)
    data = cifar100.Images(images, torch.randint(3, (40,), generator=generator))

    def exact(x):
        return x[:, :, 0, 0]

    class Swapped:
        def run(self, _, inputs):
            return [exact(cifar100.normalise(torch.from_numpy(inputs["image"])))[:, [1, 0, 2]].numpy()]

    logits = exact(cifar100.normalise(images))
    found = export_onnx.compare(Swapped(), exact, data)
    expected = [i for i, c in enumerate(logits.argmax(1).tolist()) if c < 2]
    assert [each["image"] for each in found["differing"]] == expected and 20 < len(expected) < 40
    for each in found["differing"]:
        assert {each["engine"], each["exact"]} == {0, 1} and each["margin"] > 0
        assert each["margin"] == float(logits[each["image"], each["exact"]] - logits[each["image"], each["engine"]])
    assert found["float_correct"] == int((logits.argmax(1) == data.labels).sum()) and found["images"] == 40
    assert found["identical"] == 0
    text = export_onnx.text(found)
    assert f"Same prediction: {40 - len(expected)}/40" in text
    assert text.count("whose two logits differ by") == 20 and f"and {len(expected) - 20} with smaller" in text


def test_bad_input(checkpoint, narrow_checkpoint, tmp_path, monkeypatch):
    out = str(tmp_path / "x.onnx")
    with pytest.raises(BadInput, match="no claim next to it"):
        main(["--checkpoint", str(narrow_checkpoint), "--network", NARROW, "--out", out])
    for module in ("onnx", "onnxruntime"):
        with monkeypatch.context() as without, pytest.raises(BadInput, match=f"{module} is not installed: pip install"):
            without.setitem(sys.modules, module, None)
            main(["--checkpoint", str(checkpoint), "--out", out, "--verify"])
    assert list(tmp_path.iterdir()) == []


def test_formats_that_8_bit_kernels_do_not_have(shipped):
    model, claim = shipped
    narrow = copy.deepcopy(claim)
    narrow["activations"][5]["bits"] = 9
    with pytest.raises(BadInput, match="has 9 bits: expected at most 8"):
        Exporter(model, narrow)
    coarse = copy.deepcopy(claim)
    coarse["activations"][0]["step"] = 1 / 32
    with pytest.raises(BadInput, match="the image has 8 bits and the step"):
        Exporter(model, coarse).finished({})
    tiny = copy.deepcopy(model)
    with torch.no_grad():
        bn = tiny.layers[5].bn2
        bn.weight[bn.bias.abs().argmax()] = 2.0**-24  # the smallest float16
    graph = Exporter(tiny, claim)
    with pytest.raises(BadInput, match="layers.5.conv2: a shift of .* units does not fit 32 bits"):
        graph.finished({})


@torch.no_grad()
def test_a_channel_that_weight_decay_has_left(small_checkpoint, tmp_path):
    """Its scale is so small that the shift, in units of the sums, has more than 32 bits: it becomes a constant."""
    state = load_state(small_checkpoint)
    for channel, gamma in enumerate((1e-5, 1e-8, 1e-20)):
        state["layers.3.bn1.weight"][channel], state["layers.3.bn1.bias"][channel] = gamma, 0.3
    save_tensors(state, tmp_path / "masked.pt")
    out = tmp_path / "out.pt"
    assert quantize.main(["--checkpoint", str(tmp_path / "masked.pt"), "--out", str(out), "--made-up", "40", "--renew",
                          "0", "--ranges", "mse", "--network", SPEC]) == 0
    model, claim = checkpoints.load(out, network=SPEC)
    block = model.layers[3]
    gone = block.bn1.weight == 0
    assert gone[1] and gone[2] and not block.conv1.weight[gone].any() and (block.bn1.bias[:3] > 0.29).all()
    data = cifar100.made_up(10, 1)
    engine = session(Exporter(model, claim).finished({}).SerializeToString())
    exact = exact_network(model, claim["activations"])
    assert torch.equal(export_onnx.run(engine, data.images), exact(cifar100.normalise(data.images)))


def test_benchmark(checkpoint, tmp_path, capsys):
    from benchmarks import inference_speed

    file = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    try:
        assert inference_speed.main(["--checkpoint", str(checkpoint), "--batches", "1", "2", "--rounds", "1",
                                     "--seconds", "0.01", "--threads", "1", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    figures = load_json(file)
    names = ("torch", "torch fused", "onnx float", "onnx 8-bit")
    assert set(figures["speeds"]) == {f"{name}, {n}" for name in names for n in (1, 2)}
    assert figures["profiles"]["onnx 8-bit, 1"]["QLinearConv"]["nodes"] == 39
    for parts in figures["parts"].values():
        assert list(sorted(parts)) == sorted([*inference_speed.PARTS.values(), "input, mean and linear layer"])
    model, claim = checkpoints.load(checkpoint)
    runs, _ = inference_speed.engines(model, claim, 1)
    images = cifar100.made_up(3, 4).images
    wanted, *others = (run(images) for run in (runs["torch"], runs["torch fused"], runs["onnx float"]))
    for logits in others:
        assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert "images/s" in capsys.readouterr().out
    rows = tables.inference_table(figures).splitlines()[2:]
    assert len(rows) == 8 + 6
    median = figures["speeds"]["onnx 8-bit, 2"]
    ratios = f"{median['ratio_to_torch']:.2f} | {median['ratio_to_onnx_float']:.2f}"
    assert rows[7] == f"| 2 | onnx 8-bit | {median['images_per_second'][0]:,.0f} | {ratios} |"
    floats, codes = (figures["parts"][f"onnx {kind}, 2"]["stem, 3x3"] for kind in ("float", "8-bit"))
    assert f"| 2 | onnx 8-bit: stem, 3x3 alone | {1e6 / codes:,.0f} |  | {floats / codes:.2f} |" in rows
    names = {"conv1.sums_token_24_kernel_time": "stem, 3x3", "layers.16.relu1_nchwc_kernel_time": "expansions, 1x1",
             "layers.3.conv2.sums": "depthwise convolutions, 3x3",
             "/network/layers/layers.3/conv2/Conv": "depthwise convolutions, 3x3",
             "layers.3.out.codes": "projections, shortcuts and residual sums, 1x1",
             "relu2_nchwc": "head, 1x1", "features_kernel_time": "input, mean and linear layer"}
    assert {name: inference_speed.part_of(name) for name in names} == names
