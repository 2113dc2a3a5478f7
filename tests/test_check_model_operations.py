import json

import pytest
import torch
from torch import nn

import check_model_operations
from check_model_operations import main
from compressed import checkpoints, claims, counting
from compressed.claims import check
from compressed.errors import BadInput
from compressed.files import save_record, save_tensors, sha256
from compressed.graph import read_graph, weight_layers
from compressed.networks import load_checkpoint
from mobilenet_v2 import MobileNetV2
from small import NARROW as SPEC


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """(checkpoint, claim) of a thin network whose random weights stand on 4-, 6- and 8-bit grids, 80% of them zero."""
    generator = torch.Generator().manual_seed(0)
    model, tensors = MobileNetV2(width=0.5).eval(), []

    def snap(name, parameter, bits, step, share=1.0):
        codes = torch.randint(-2 ** (bits - 1), 2 ** (bits - 1), parameter.shape, generator=generator)
        codes *= torch.rand(parameter.shape, generator=generator) < share
        codes.view(-1)[:2] = torch.tensor([-2 ** (bits - 1), 1])
        parameter.data.copy_(codes * step)
        tensors.append({"name": name, "bits": bits, "step": step})

    for index, (name, layer) in enumerate(weight_layers(model)):
        snap(f"{name}.weight", layer.weight, (4, 6, 8)[index % 3], 2.0 ** -(5 + index % 2), 0.2)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator).half())
            module.weight.data[:2] = torch.tensor([1 + 2.0**-10, 2.0**-14 + 2.0**-24])  # no 16-bit integers of one step
            tensors.append({"name": f"{name}.weight", "bits": 16, "kind": "float16"})
            snap(f"{name}.bias", module.bias, 16, 2.0**-12)
    snap("linear.bias", model.linear.bias, 16, 2.0**-13)
    path = tmp_path_factory.mktemp("shipped") / "network.pt"
    save_tensors(model.state_dict(), path)
    activations = [{"name": name, "bits": 8, "signed": signed, "step": 0.0625}
                   for name, signed in read_graph(model).activation_points.items()]
    claim = {"sha256": sha256(path), "tensors": tensors, "activations": activations,
             "network": claims.network(SPEC, model)}
    save_record(claim, path.with_suffix(".json"))
    return path, claim


@pytest.fixture
def claimed(shipped):
    """A function that writes a claim beside the checkpoint; the true one is put back afterwards."""
    path, claim = shipped
    yield lambda changed: save_record(changed, path.with_suffix(".json"))
    save_record(claim, path.with_suffix(".json"))


@pytest.fixture(autouse=True)
def no_thop(request, monkeypatch):
    """thop takes a second each time: only the test that is about it runs it."""
    if "thop" not in request.node.name:
        monkeypatch.setattr(check_model_operations, "thop_counts", lambda model: None)


def report(capsys, *argv) -> dict:
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_true_claim(shipped, capsys):
    path, claim = shipped
    found = report(capsys, "--checkpoint", path)
    assert found["problems"] == [] and found["source"]["sha256"] == claim["sha256"]
    assert len(found["formats"]) == 173 and found["formats"]["conv1.weight"] == {"bits": 4, "grid": "claimed"}
    storage, bits = found["storage"], {entry["name"]: entry["bits"] for entry in claim["tensors"]}
    stored = sum(row["nonzeros"] * bits[row["name"]] for row in found["weights"]["tensors"])
    positions = sum(row["total"] for row in found["weights"]["tensors"])
    assert storage["weights"] == stored and storage["masks"] == positions
    scales = [p.numel() for name, p in load_checkpoint(path, SPEC).named_parameters() if "linear" not in name
              and p.dim() == 1]
    assert storage["batchnorm"] == 16 * sum(scales) and storage["biases"] == 1600
    assert storage["steps"] == 32 * (58 + 57 + 1 + 55)  # weights, shifts, the bias, activations; float16 has none
    assert storage["total"] == sum(bits for kind, bits in storage.items() if kind != "total")
    assert len(found["rows"]) == 57 + 57 + 36 + 14 + 2
    for convention, totals in found["totals"].items():
        assert totals["bits"] == sum(row["conventions"][convention]["bits"] for row in found["rows"])
        assert found["score"][convention]["operations"] == totals["bits"] / 32 / 10.49e9
        assert found["score"][convention]["storage"] == storage["total"] / 32 / 36.5e6
        assert totals["bits"] < found["dense"][convention]["bits"] < found["float32_dense"]["totals"]["bits"]
    rows = {row["name"]: row for row in found["rows"]}
    for weight in found["weights"]["tensors"]:
        layer = rows[weight["name"].removesuffix(".weight")]
        positions = layer["outputs"] // weight["shape"][0]
        assert layer["multiplications"] == weight["nonzeros"] * positions
        assert list(layer["conventions"]["tree"]["multiplications"]) == ["8"]  # that of the activations
    assert found["totals"]["tree"]["bits"] < found["totals"]["fixed"]["bits"] < found["totals"]["32-bit"]["bits"]


def test_table(shipped, capsys):
    path, _ = shipped
    assert main(["--checkpoint", str(path)]) == 0
    out = capsys.readouterr().out
    for text in ("layers.16.shortcut.0", "layers.0.add", "weight tensors: 20 at 4 bits, 19 at 6 bits, 19 at 8 bits",
                 "activation points: 55 at 8 bits", "storage / 36.5M"):
        assert text in out, text
    assert main(["--dense", "--summary"]) == 0
    short = capsys.readouterr().out
    for text in ("77.846M + 153.407M = 231.253M", "39.494M + 76.704M = 116.198M", "153,407,488", "306,814,976",
                 "3.990M parameters", "operations / 10.49B", "without thop's count"):
        assert text in short, text
    assert "layers.0.add" not in short


def test_without_a_claim(shipped, tmp_path, capsys):
    path, claim = shipped
    alone = tmp_path / "alone.pt"
    alone.write_bytes(path.read_bytes())
    found = report(capsys, "--checkpoint", alone, "--network", SPEC)
    assert {name: f["bits"] for name, f in found["formats"].items()} == {e["name"]: e["bits"] for e in claim["tensors"]}
    assert found["storage"]["steps"] == 32 * (58 + 57 + 1) and found["formats"]["bn1.weight"]["grid"] == "float16"
    assert list(found["rows"][0]["conventions"]["fixed"]["additions"]) == ["32"]  # float32 activations
    narrow = report(capsys, "--checkpoint", alone, "--network", SPEC, "--activation-bits", "8")
    both = report(capsys, "--checkpoint", path)
    assert narrow["score"]["tree"] == both["score"]["tree"] and narrow["storage"] == both["storage"]
    assert narrow["source"]["what if"] == "--activation-bits 8"


def changed(claim, key, index, **values):
    entries = [dict(entry) for entry in claim[key]]
    entries[index] |= values
    return claim | {key: entries}


def test_wrong_claims(shipped):
    path, claim = shipped
    tensors, model = claim["tensors"], load_checkpoint(path, SPEC)
    assert check(claim, path, model)[1] == []
    cases = [
        (changed(claim, "tensors", 2, bits=7), "layers.0.conv2.weight: the values are no 7-bit multiples"),
        (changed(claim, "tensors", 2, step=2.0**-4), "layers.0.conv2.weight: the values are no 8-bit multiples"),
        (changed(claim, "tensors", 2, step=2.0**-6), "layers.0.conv2.weight: the values are no 8-bit multiples"),
        (changed(claim, "tensors", 2, step=-1), "layers.0.conv2.weight: claimed step -1"),
        (changed(claim, "tensors", 2, step=10**400), "layers.0.conv2.weight: claimed step 1000"),
        (changed(claim, "tensors", 2, step=2.0**-129), "layers.0.conv2.weight: claimed step 1.469"),
        (changed(claim, "tensors", 2, step=[0.1, 0.2]), "layers.0.conv2.weight: claimed step"),
        (changed(claim, "tensors", 58, bits=15), "bn1.weight: the values need 16 bits"),
        (changed(claim, "tensors", 58, kind="bfloat16"), "bn1.weight: the values are no 16-bit bfloat16"),
        (changed(claim, "tensors", 58, kind={"a": 1}), "bn1.weight: the values are no 16-bit {'a': 1}"),
        (changed(claim, "tensors", 58, kind="float8"), "bn1.weight: the values are no 16-bit float8"),
        (changed(claim, "tensors", 58, bits=17), "bn1.weight: the values are no 17-bit float16"),
        (changed(claim, "tensors", 59, bits=15), "bn1.bias: the values are no 15-bit multiples"),
        (claim | {"tensors": tensors[:-1]}, "linear.bias: not in the claim"),
        (claim | {"tensors": [*tensors, {"name": "extra", "bits": 8}]}, "extra: claimed, but not in the network"),
        (claim | {"activations": claim["activations"][1:]}, "activation image: not in the claim"),
    ]
    for wrong, message in cases:
        formats, problems = check(wrong, path, model)
        assert len(problems) == 1 and problems[0].startswith(message), message
        assert all(formats.tensors[entry["name"]].bits >= entry["bits"] for entry in tensors)


@torch.no_grad()
def test_values_one_unit_in_the_last_place_off_their_grids(shipped):
    path, claim = shipped
    model, stepped = load_checkpoint(path, SPEC), {entry["name"] for entry in claim["tensors"] if "step" in entry}
    for name in stepped:
        value = model.get_parameter(name)
        value.copy_(torch.where(value != 0, value.nextafter(torch.tensor(9.0)), value))
    problems = check(claim, path, model)[1]
    assert {problem.split(":")[0] for problem in problems} == stepped


def test_claims_about_another_file_or_other_counts(shipped, claimed, capsys):
    path, claim = shipped
    model = load_checkpoint(path, SPEC)
    formats, _ = check(claim, path, model)
    counts = counting.summary(model, formats)
    claimed(claim | {"counts": counts})
    assert main(["--checkpoint", str(path), "--summary"]) == 0 and not capsys.readouterr().err
    counts["storage"]["total"] -= 1
    for wrong, message in ((claim | {"counts": counts}, "the counts that"),
                           (claim | {"sha256": "0" * 64}, "SHA-256 0000")):
        claimed(wrong)
        assert main(["--checkpoint", str(path), "--summary"]) == 2
        captured = capsys.readouterr()  # the report is printed all the same
        assert message in captured.err and len(captured.err.splitlines()) == 1 and "operations / 10.49B" in captured.out


def test_a_wrong_claim_does_not_lower_the_count(shipped, claimed, capsys):
    path, claim = shipped
    honest = report(capsys, "--checkpoint", path)
    claimed(changed(claim, "tensors", 2, bits=2, step=1.0))
    assert main(["--checkpoint", str(path), "--json"]) == 2
    wrong = json.loads(capsys.readouterr().out)
    assert wrong["storage"] == honest["storage"] and wrong["totals"] == honest["totals"] and len(wrong["problems"]) == 1


def test_a_sign_that_the_network_does_not_have(shipped, claimed, capsys):
    """Without a sign a value reaches twice as far, and accumulators may seem shorter."""
    path, claim = shipped
    signed = claim["activations"][3]["signed"]
    claimed(changed(claim, "activations", 3, signed=not signed))
    assert main(["--checkpoint", str(path), "--summary"]) == 2
    assert f"{claim['activations'][3]['name']}: signed is {not signed}, expected {signed}" in capsys.readouterr().err


def test_wider_claims_are_counted_as_claimed(shipped, claimed, capsys):
    path, claim = shipped
    narrow = report(capsys, "--checkpoint", path)
    claimed(changed(claim, "tensors", 0, bits=9, step=2.0**-6))  # 4-bit codes of 2^-5 are 5-bit codes of 2^-6
    wide = report(capsys, "--checkpoint", path)
    nonzeros = narrow["weights"]["tensors"][0]["nonzeros"]
    assert wide["storage"]["weights"] == narrow["storage"]["weights"] + 5 * nonzeros
    first, before = wide["rows"][0]["conventions"], narrow["rows"][0]["conventions"]
    assert list(first["fixed"]["multiplications"]) == ["9"]
    assert int(*first["fixed"]["additions"]) == int(*before["fixed"]["additions"]) + 1  # codes twice as large


@pytest.mark.parametrize("key, value", [("tensors", None), ("tensors", [3]), ("activations", {}),
                                        ("tensors", [{"bits": 8}]),
                                        ("tensors", [{"name": "conv1.weight", "bits": "8"}]),
                                        ("tensors", [{"name": "conv1.weight", "bits": 0}]),
                                        ("tensors", [{"name": "conv1.weight", "bits": True}]),
                                        ("tensors", [{"name": "conv1.weight", "bits": 8}] * 2),
                                        ("activations", [{"name": "image", "bits": 8}])])
def test_malformed_claims(shipped, claimed, key, value):
    path, claim = shipped
    claimed(claim | {key: value})
    with pytest.raises(BadInput, match=key.rstrip("s")):
        main(["--checkpoint", str(path)])


def test_a_network_of_kaists_is_no_other():
    with pytest.raises(BadInput, match="some.t7 is read as a network of KAIST AI's; leave the option out"):
        main(["--checkpoint", "some.t7", "--network", SPEC])


def test_what_if_without_a_checkpoint(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path / "nowhere.pt")
    dense = report(capsys, "--dense")
    assert dense["totals"]["32-bit"] == dense["float32_dense"]["totals"] == dense["totals"]["tree"]
    assert dense["totals"]["tree"]["multiplications"] == 153_407_488 + 2_284_288 + 2_029_568 + 1664
    assert dense["storage"]["total"] == 32 * 3_989_668 and "weights" not in dense
    half = report(capsys, "--sparsity", "0.5", "--weight-bits", "8", "--activation-bits", "8")
    conv = half["rows"][3]  # layers.0.conv1: 40 terms, 20 of them stored
    assert conv["multiplications"] == 20 * conv["outputs"] and conv["additions"] == 19 * conv["outputs"]
    assert half["storage"]["steps"] == 32 * (58 + 55) and half["storage"]["weights"] >= 8 * 3_944_032 // 2
    assert half["submission"] == dense["submission"]
    four = report(capsys, "--sparsity", "0.5", "--weight-bits", "4", "--activation-bits", "4")
    stem, *others = ([*row["conventions"]["tree"]["multiplications"]] for row in four["rows"] if row["kind"] == "conv")
    assert stem == ["8"] and {"4"} == {bits for row in others for bits in row}  # the stem reads the image: pixels
    with pytest.raises(SystemExit):
        main(["--dense", "--checkpoint", "x.pt"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_trace_that_torch_contradicts_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(check_model_operations, "flop_counter", lambda model: 2)
    assert main(["--dense", "--summary"]) == 2
    out, err = capsys.readouterr()
    assert "NOT twice as many" in out and "FlopCounterMode does not count two" in err


@pytest.mark.parametrize("argv", [["--activation-bits", "33"], ["--dense", "--sparsity", "0.5"]])
def test_bad_options(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2 and argv[0] in capsys.readouterr().err


def test_thop(capsys):
    pytest.importorskip("thop")
    assert main(["--dense", "--summary"]) == 0
    assert "thop 162,544,640 for one image, 325,089,280 for two: the multiply-accumulates" in capsys.readouterr().out
