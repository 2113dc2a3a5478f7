import contextlib
import hashlib
import json
import random
import struct

import pytest
import torch
from torch import nn

from compressed import claims, counting, mnet
from compressed.checkpoints import load, read
from compressed.claims import claim_path, stated_formats
from compressed.errors import BadInput
from compressed.files import digest, save_record, save_tensors, sha256
from compressed.graph import trace, weight_layers
from compressed.mnet import from_bits, pack, to_bits, unpack, unpack_bytes
from compressed.networks import load_checkpoint
from small import CLASSES, WIDTH, tiny_network
from tools.pack import main

SPEC = f"mobilenet_v2:MobileNetV2?width={WIDTH}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, claim, path of its packed file, bytes by section)."""
    model, claim = tiny_network()
    with torch.no_grad():  # what a format could get wrong
        model.bn1.weight[:4] = torch.tensor([2.0**-24, -2.0**-24, 65504.0, -0.0])  # the ends of float16
        codes = (model.bn1.bias / 2.0**-17).round().clamp(-2**15, 2**15 - 1)
        codes[:3] = torch.tensor([-2.0**15, 2**15 - 1, -1])
        model.bn1.bias.copy_(codes * 2.0**-17)
        model.layers[5].conv3.weight.zero_()  # nothing but a mask
        model.conv1.weight[model.conv1.weight == 0] = 2.0**-5
        model.conv1.weight[0, 0, 0, 0] = 0  # too few zeros for a mask: dense
    next(entry for entry in claim["tensors"] if entry["name"] == "bn1.bias")["step"] = 2.0**-17
    path = tmp_path_factory.mktemp("tiny") / "network.mnet"
    return model, claim, path, pack(model, claim, path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(path, model, claim) of a network of 100 classes, and the specification of its network."""
    model, claim = tiny_network(100)
    path = tmp_path_factory.mktemp("small") / "network.pt"
    save_tensors(model.state_dict(), path)
    claim["sha256"] = sha256(path)
    save_record(claim, claim_path(path))
    return path, model, claim


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether two state dicts have the same bits, but for the counters that inference does not read."""
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(
        ours[key].dtype == theirs[key].dtype and ours[key].view(torch.int32).equal(theirs[key].view(torch.int32))
        for key in ours if not key.endswith("num_batches_tracked"))


# ---- There and back ------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", range(1, 17))
def test_bit_streams(bits):
    low, high = -2 ** (bits - 1), 2 ** (bits - 1) - 1
    codes = torch.randint(low, high + 1, (101,), generator=torch.Generator().manual_seed(bits)).numpy()
    codes[:2] = low, high
    stream = to_bits(codes, bits)
    assert len(stream) == (101 * bits + 7) // 8 and from_bits(stream, 101, bits).tolist() == codes.tolist()
    written = "".join(format(int(code) % 2**bits, f"0{bits}b") for code in codes)  # two's complement, highest bit first
    assert "".join(format(byte, "08b") for byte in stream) == written + "0" * (-len(written) % 8)


def test_round_trip(tiny):
    model, claim, path, _ = tiny
    returned, formats = unpack(path)
    assert same(model, returned) and not returned.training
    assert formats == claim
    assert all(parameter.requires_grad for parameter in returned.parameters())
    assert {value.device.type for value in returned.state_dict().values()} == {"cpu"}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), returned(x))


def test_packing_is_a_function_of_the_content(tiny, tmp_path):
    _, _, path, _ = tiny
    pack(*unpack(path), tmp_path / "again.mnet")
    assert (tmp_path / "again.mnet").read_bytes() == path.read_bytes()


def test_layout(tiny):
    """The file, read by hand with the description in mnet.py."""
    model, claim, path, _ = tiny
    data = path.read_bytes()
    assert data[:8] == b"MNET\x01\x00" + struct.pack("<H", CLASSES) and struct.unpack("<d", data[8:16]) == (WIDTH,)
    for i, entry in enumerate(claim["activations"]):
        kind, exponent = struct.unpack("<Bb", data[16 + 2 * i:18 + 2 * i])
        assert (kind, 2.0**exponent) == (entry["bits"] | 0x20 * entry["signed"], entry["step"])
    at = 16 + 2 * len(claim["activations"])
    assert data[at:at + 2] == struct.pack("<Bb", 6, -5)  # the stem: dense, 6 bits, step 2^-5
    assert data[at + 2:at + 2 + 162] == to_bits((model.conv1.weight.detach() * 32).flatten().int().numpy(), 6)
    at += 2 + 8 * 27 * 6 // 8
    assert data[at:at + 2] == struct.pack("<Bb", 16 | 0x40, 0)
    assert data[at + 2:at + 10] == bytes.fromhex("0100 0180 ff7b 0080")
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()


def test_sections_are_what_is_counted(tiny):
    """Byte for byte: but for filled-up bytes, steps (2 bytes for a format instead of 4), header and checksum."""
    model, claim, path, sections = tiny
    counted = counting.storage(model, trace(model), stated_formats(model, claim))
    assert sections["total"] == path.stat().st_size == sum(size for kind, size in sections.items() if kind != "total")
    bits, parts = {entry["name"]: entry["bits"] for entry in claim["tensors"]}, []
    layouts = counting.layouts(trace(model), stated_formats(model, claim))
    for name, layer in weight_layers(model):
        n, stored, width = layer.weight.numel(), int(layer.weight.count_nonzero()), bits[f"{name}.weight"]
        masked = layouts[name].masked
        parts.append((stored * width if masked else n * width, n if masked else 0))
    assert any(mask for _, mask in parts) and not all(mask for _, mask in parts)
    assert (counted["weights"], counted["masks"]) == tuple(map(sum, zip(*parts)))
    whole = [(-(-values // 8), -(-mask // 8)) for values, mask in parts]  # each filled up to a byte
    assert (sections["weights"], sections["masks"]) == tuple(map(sum, zip(*whole)))
    for kind in ("batchnorm", "biases"):
        assert sections[kind] == counted[kind] / 8
    assert (sections["header"], sections["checksum"]) == (16, 32)
    convolutions = len(parts) - 1  # each with a scale, which has no step, and a shift
    assert sections["steps"] == 2 * (55 + 3 * convolutions + 2)
    assert counted["steps"] == 32 * (55 + 2 * convolutions + 2)


# ---- Damage --------------------------------------------------------------------------------------

def refused(data: bytes) -> str:
    with pytest.raises(BadInput) as error:
        unpack_bytes(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_any_flipped_byte_is_noticed(tmp_path):
    pack(*tiny_network(2, 0.1), tmp_path / "smallest.mnet")
    data, draw = (tmp_path / "smallest.mnet").read_bytes(), random.Random(0)
    for i in (*range(60), *range(60, len(data), 13), *range(len(data) - 32, len(data))):
        flipped = bytearray(data)
        flipped[i] ^= draw.randrange(1, 256)
        assert refused(bytes(flipped)).startswith("not a packed network" if i < 4 else "damaged or cut")


def test_cut_and_extended_files(tiny):
    data, draw = tiny[2].read_bytes(), random.Random(0)
    for size in (*range(60), *range(60, len(data), 997), len(data) - 32, len(data) - 1):
        assert refused(data[:size]).startswith("not a packed network" if size < 4 else "damaged or cut")
    for garbage in (b"\0", b"\n", data, draw.randbytes(100)):
        assert refused(data + garbage).startswith("damaged or cut")


def test_foreign_files(tiny, tmp_path):
    model, path = tiny[0], tmp_path / "file.mnet"
    for content in (b"", b"M", b"\x89PNG\r\n", b"{}", b"MNET", b"MNET" + bytes(44), random.Random(0).randbytes(5000)):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"file.mnet: (not a packed network|damaged or cut)"):
            unpack(path)
    save_tensors(model.state_dict(), path)
    for bad in (path, tmp_path, tmp_path / "missing.mnet", "/dev/zero"):
        with pytest.raises(BadInput, match="not a packed network|no such file"):
            load(bad) if str(bad).endswith(".mnet") else unpack(bad)


def sealed(data: bytes) -> bytes:
    """Content with a checksum that is right: the work of a program, not of chance."""
    return data + hashlib.sha256(data).digest()


@pytest.mark.parametrize("change, line", [
    (lambda b: b.__setitem__(4, 3), "of version 3; this program reads versions 1 and 2"),
    (lambda b: b.__setitem__(slice(6, 8), b"\0\0"), "without classes"),
    (lambda b: b.__setitem__(slice(6, 8), b"\xff\xff"), "ends too early"),
    (lambda b: b.__setitem__(slice(6, 16), struct.pack("<Hd", 65535, 8.0)), "bn1.weight has the unknown format"),
    (lambda b: b.__setitem__(slice(8, 16), struct.pack("<d", float("nan"))), "width multiplier nan"),
    (lambda b: b.__setitem__(slice(8, 16), struct.pack("<d", 1e300)), "width multiplier 1e"),
    (lambda b: b.__setitem__(16, 0), "activation image has the unknown format 0x00"),
    (lambda b: b.__setitem__(16, 0x88), "activation image has the unknown format 0x88"),
    (lambda b: b.__setitem__(16 + 110, 0), "conv1.weight has the unknown format 0x00"),
    (lambda b: b.__setitem__(16 + 110, 31), "conv1.weight has the unknown format 0x1f"),
    (lambda b: b.__setitem__(16 + 110, 0x48), "conv1.weight has the unknown format 0x48"),
    (lambda b: b.__setitem__(slice(292, 294), b"\x00\x7c"), "bn1.weight holds values that are not finite"),
    (lambda b: b.__setitem__(5, 1), "the byte after its version is 1, expected 0"),
    (lambda b: b.__setitem__(291, 1), "bn1.weight is not stored as it has to be"),  # the exponent of float16
    (lambda b: b.append(0), "1 bytes are left over"),
    (lambda b: b.__delitem__(-1), "ends too early"),
])
def test_content_that_makes_no_sense(tiny, change, line):
    content = bytearray(tiny[2].read_bytes()[:-32])
    change(content)
    assert line in refused(sealed(bytes(content)))


@pytest.mark.parametrize("kind, stream, good", (
    (4, b"\x12\x30", True), (4, b"\x12\x31", False),  # three codes, four bits to fill up
    (4 | mnet.MASKED, b"\xa0\x12", True), (4 | mnet.MASKED, b"\xb0\x12", False),  # a mask of three, five to fill up
    (4 | mnet.MASKED, b"\xa0\x10", False), (4 | mnet.MASKED, b"\x80\x10", True),  # a code 0, marked as none
    (4 | mnet.MASKED, b"\x80\x11", False), (1, b"\xa0", True), (1, b"\xa8", False)))
def test_a_tensor_has_one_encoding_with_a_mask_and_one_without(kind, stream, good):
    reader = mnet.Reader(bytes([kind, 0]) + stream)
    with contextlib.nullcontext() if good else pytest.raises(BadInput, match="x is not stored as it has to be"):
        mnet.unpack_tensor(reader, torch.Size([3]), "x")


@pytest.mark.filterwarnings("error")
def test_random_content_is_read_or_refused(tiny):
    """With a true checksum anything may come: a network or one line, no other exception and no warning."""
    data, draw, read = tiny[2].read_bytes()[:-32], random.Random(0), 0
    for i in range(24):
        content = bytearray(data)
        for _ in range(draw.choice((1, 3, 30))):
            at = draw.randrange(4, 400) if i % 2 else draw.randrange(4, len(data))
            content[at] = draw.randrange(256)
        try:
            unpack_bytes(sealed(bytes(content)))
            read += 1
        except BadInput as error:
            assert "\n" not in str(error)
    assert 1 < read < 23


# ---- What cannot be packed -----------------------------------------------------------------------

@pytest.mark.parametrize("change, line", [
    (lambda model, claim: claim["tensors"][0].update(bits=3), "conv1.weight: the values are no 3-bit multiples"),
    (lambda model, claim: claim["tensors"][0].update(step=[2.0**-5] * 8), "conv1.weight .* has 6 bits and 8 steps"),
    (lambda model, claim: claim["activations"][3].update(step=0.3), "has the step 0.3"),
    (lambda model, claim: claim["activations"][3].update(step=None), "has the step None"),
    (lambda model, claim: claim["activations"][3].update(step=2.0**-200), "expected a power of two from 2"),
    (lambda model, claim: claim["activations"][3].update(bits=20), "has 20 bits"),
    (lambda model, claim: model.bn1.running_mean[0].fill_(1e-30), "cannot hold bn1.running_mean"),
])
def test_what_cannot_be_packed(change, line, tmp_path):
    model, claim = tiny_network()
    change(model, claim)
    with pytest.raises(BadInput, match=line):
        pack(model, claim, tmp_path / "file.mnet")
    assert not list(tmp_path.iterdir())


def test_a_network_that_the_claim_does_not_name(tiny, tmp_path):
    for network in ({}, {"network": {"spec": "mobilenet_v2:MobileNetV2?width=0.5"}}):
        with pytest.raises(BadInput, match="cannot hold this network as mobilenet_v2:MobileNetV2.*: "):
            pack(tiny[0], {key: tiny[1][key] for key in ("tensors", "activations")} | network, tmp_path / "file.mnet")
    assert not list(tmp_path.iterdir())


def test_a_network_that_computes_with_values_when_it_is_made(tmp_path):
    """Shapes alone are not enough for some: those of the user, whose code is only run if --network names it."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom mobilenet_v2 import MobileNetV2\n\ndef make(num_classes):\n"
        f"    return MobileNetV2(width=torch.tensor([{WIDTH}]).item(), num_classes=num_classes)\n")
    spec = f"{tmp_path}/net.py:make"
    model, claim = tiny_network()
    claim["network"] = claims.network(spec, model)
    pack(model, claim, tmp_path / "file.mnet")
    assert unpack(tmp_path / "file.mnet", spec)[1]["network"]["spec"] == spec
    with pytest.raises(BadInput, match="to run that code, say --network"):
        unpack(tmp_path / "file.mnet")


# ---- Like a checkpoint ---------------------------------------------------------------------------

def test_load(small, tmp_path):
    path, model, claim = small
    assert same(read(path).model, model) and read(path).claim == claim | {"digest": digest(claim)}
    assert read(path).problems == []
    file = tmp_path / "network.mnet"
    pack(model, claim, file)
    alone = read(file)
    formats = {key: claim[key] for key in ("tensors", "activations", "network")}
    # without a claim: what the file states
    assert same(model, alone.model) and alone.claim == formats and alone.problems == []
    assert alone.sha256 == sha256(file)

    save_record(claim | {"sha256": "of the .pt", "accuracy": 1}, claim_path(file))
    assert len(read(file).problems) == 1 and "about another file, with SHA-256 None" in read(file).problems[0]
    said = claim | {"sha256": "of the .pt", "packed": {"sha256": sha256(file)}}
    save_record(said, claim_path(file))
    assert load(file)[1]["packed"] == said["packed"] and read(file).problems == []

    other = json.loads(json.dumps(said))
    for entry in other["activations"][:4]:
        entry["step"] *= 2
    save_record(other, claim_path(file))
    with pytest.raises(BadInput, match=r"do not agree on the format of image; .* \(and 1 more\)"):
        load(file)

    save_record(said | {"network": claim["network"] | {"graph": "0" * 64}}, claim_path(file))
    (problem,) = read(file).problems
    assert "it is of another network than" in problem
    save_record(said | {"network": 3}, claim_path(file))
    with pytest.raises(BadInput, match="holds no specification"):
        read(file)

    (tmp_path / "alone.pt").write_bytes(path.read_bytes())
    assert read(tmp_path / "alone.pt", SPEC).claim is None
    with pytest.raises(BadInput, match="no claim next to it"):
        load(tmp_path / "alone.pt", SPEC)


def test_script(small, tmp_path, capsys):
    source, model, claim = small
    path = tmp_path / "network.pt"
    path.write_bytes(source.read_bytes())
    save_record(claim, claim_path(path))
    with pytest.raises(BadInput, match="ends in .mnet"):
        main(["--checkpoint", str(path), "--out", str(path)])
    save_record(claim | {"counts": {"of": "other rules"}}, claim_path(path))
    assert main(["--checkpoint", str(path), "--out", "network.mnet"]) == 0
    out, file = capsys.readouterr().out, tmp_path / "network.mnet"
    counts = counting.summary(model, stated_formats(model, claim))
    assert "the counts in it were outdated, and were replaced" in out
    assert f"{file.name}: {file.stat().st_size:,} bytes" in out and "32-bit parameters in the file" in out
    recorded = json.loads(claim_path(path).read_text())
    packed_file = {"file": "network.mnet", "bytes": file.stat().st_size, "sha256": sha256(file)}
    assert recorded.pop("digest") == digest(recorded)
    assert recorded == claim | {"counts": counts, "packed": packed_file}
    assert load(file)[1]["packed"]["sha256"] == sha256(file)
    again = tmp_path / "again.mnet"  # a packed file can be packed; other names leave the claim alone
    assert main(["--checkpoint", str(file), "--out", str(again)]) == 0
    assert again.read_bytes() == file.read_bytes()
    assert json.loads(claim_path(path).read_text()) == recorded | {"digest": digest(recorded)}
    assert same(load_checkpoint(path, SPEC), load(again)[0]) and type(load(again)[0]).__name__ == "MobileNetV2"
