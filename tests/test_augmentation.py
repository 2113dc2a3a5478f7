"""Augmentation against slow references and torchvision, and slices of a batch against the whole."""
import numpy as np
import pytest
import torch

from compressed import cifar100
from training import augmentation
from training.augmentation import OPS, Draws, draw


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------ draws

EVERYTHING = dict(augment="trivial", mixing="both")
TENSORS = ("top", "left", "flip", "op", "magnitude", "lam", "weight", "box")


@pytest.mark.parametrize("options", [{}, EVERYTHING, dict(augment="none", mixing="mixup"), dict(mixing="cutmix")])
def test_draws_are_reproducible_and_a_slice_does_what_the_whole_does(options):
    batch = cifar100.made_up(37, 0)
    draws, again = (draw(37, generator(5), **options) for _ in range(2))
    whole = augmentation.augment(batch.images, batch.labels, draws)
    for a, b in zip(whole, augmentation.augment(batch.images, batch.labels, again)):
        assert torch.equal(a, b)
    thirds = slice(0, 12), slice(12, 24), slice(24, 37)
    parts = [augmentation.augment(batch.images[third], batch.labels[third], draws[third]) for third in thirds]
    for a, b in zip(whole, zip(*parts)):
        assert torch.equal(a, torch.cat(b))
    assert len(draws[24:99]) == 13 and whole[0].dtype == whole[3].dtype == torch.float32


def test_each_image_has_its_own_draw():
    draws = draw(512, generator(), **EVERYTHING)
    values = {"top": 9, "left": 9, "flip": 2, "op": 14}
    for name, count in values.items():
        assert getattr(draws, name).unique().tolist() == list(range(count))
    assert draws.magnitude.unique().numel() > 100 and draws.lam.unique().numel() > 100
    assert (draws.magnitude < 0).any() and (draws.magnitude[draws.op >= augmentation.POSTERIZE] >= 0).all()
    other = draw(512, generator(1), **EVERYTHING)
    assert not any(torch.equal(getattr(draws, name), getattr(other, name)) for name in TENSORS)


def test_the_images_are_left_as_they_were():
    batch = cifar100.made_up(64, 0)
    before = batch.images.clone()
    augmentation.augment(batch.images, batch.labels, draw(64, generator(), **EVERYTHING))
    assert torch.equal(batch.images, before)


def test_a_slice_that_parts_a_pair_is_refused():
    draws = draw(8, generator(), mixing="mixup")
    for part in (slice(1, 4), slice(0, 3), slice(0, 8, 2)):
        with pytest.raises(ValueError, match="partner"):
            draws[part]
    assert len(draw(8, generator())[1:4]) == 3  # without mixing there are no pairs
    with pytest.raises(ValueError, match="8 draws for 3 images"):
        augmentation.augment(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.zeros(3).long(), draws)


# ---------------------------------------------------------------------------------------------------- crop and flip

def test_crop_and_flip_are_those_of_a_slow_reference():
    images = cifar100.made_up(200, 0).images
    draws = draw(200, generator())
    expected = torch.zeros_like(images)
    for n in range(200):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = images[n]
        top, left = draws.top[n], draws.left[n]
        cropped = padded[:, top:top + 32, left:left + 32]
        expected[n] = cropped.flip(2) if draws.flip[n] else cropped
    assert torch.equal(augmentation.crop_flip(images, draws), expected)


# -------------------------------------------------------------------------------------------------- TrivialAugment

@pytest.fixture(scope="module")
def pictures():
    """Smooth, noisy, dark, low-contrast, flat, black and two-level images: every branch of every operation."""
    images = cifar100.made_up(12, 0).images
    images[4] //= 8
    images[5] = images[5] // 16 + 100
    images[6], images[7] = 77, 0
    images[8] = (images[8] > 128) * 255
    images[9, 0], images[10, :, 4:] = 3, 200
    return images


def torchvisions(name, images, magnitude):
    """What torchvision makes of a batch with one operation (v2 where it has uint8 kernels of its own)."""
    from torchvision.transforms import InterpolationMode, autoaugment
    from torchvision.transforms.v2 import functional as v2

    kernel = {"Brightness": v2.adjust_brightness, "Color": v2.adjust_saturation, "Contrast": v2.adjust_contrast,
              "Sharpness": v2.adjust_sharpness}.get(name)
    if kernel:
        return kernel(images, 1 + magnitude)
    if name in ("AutoContrast", "Equalize"):
        return {"AutoContrast": v2.autocontrast, "Equalize": v2.equalize}[name](images)
    return autoaugment._apply_op(images, name, magnitude, InterpolationMode.NEAREST, [0.0] * 3)


def test_the_magnitudes_are_torchvisions():
    from torchvision.transforms.autoaugment import TrivialAugmentWide

    space = TrivialAugmentWide()._augmentation_space(augmentation.BINS)
    assert tuple(space) == OPS
    for op, (magnitudes, signed) in enumerate(space.values()):
        assert torch.equal(augmentation.MAGNITUDES[op], magnitudes.float().expand(augmentation.BINS))
        assert signed == (op not in (0, *range(augmentation.POSTERIZE, len(OPS))))


@pytest.mark.parametrize("name", OPS)
def test_each_operation_at_each_magnitude_is_torchvisions(name, pictures):
    op = OPS.index(name)
    n, off = len(pictures), 0
    values = set(augmentation.MAGNITUDES[op].tolist())
    if op < augmentation.POSTERIZE:
        values |= {-value for value in values}
    for magnitude in values:
        draws = Draws(n, op=torch.full((n,), op), magnitude=torch.full((n,), magnitude))
        made, expected = augmentation.trivial_augment(pictures, draws), torchvisions(name, pictures, magnitude)
        difference = (made.int() - expected.int()).abs()
        if name in ("Brightness", "Color", "Contrast", "Sharpness"):  # sums in another order, then cut to whole levels
            assert difference.max() <= 1
            off += difference.count_nonzero().item()
        elif name == "Rotate":  # at 45 and 135 degrees a diagonal stands exactly between two pixels
            off += difference.count_nonzero().item()
            assert abs(magnitude) % 90 == 45 or not difference.any()
        else:
            assert not difference.any(), magnitude
    assert off <= 0.01 * pictures.numel() * len(values)


def test_a_batch_of_all_operations_is_each_image_on_its_own(pictures):
    images = pictures.repeat(20, 1, 1, 1)
    draws = draw(len(images), generator(3), "trivial")
    together = augmentation.trivial_augment(images, draws)
    alone = torch.cat([augmentation.trivial_augment(images[n:n + 1], draws[n:n + 1]) for n in range(len(images))])
    assert torch.equal(together, alone)
    identity = draws.op == augmentation.IDENTITY
    assert identity.any() and torch.equal(together[identity], images[identity])


# ----------------------------------------------------------------------------------------------------------- mixing

def hand_made(lam, weight, box):
    return Draws(len(lam), lam=torch.tensor(lam), weight=torch.tensor(weight), box=torch.tensor(box))


def test_mixing_by_hand():
    x = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    labels = torch.arange(10, 15)
    none = [0, 0, 0, 0]
    draws = hand_made([0.75, 1.0, 0.9375, 0.25, 0.5], [0.75, 1.0, 1.0, 0.25, 0.5],
                      [none, none, [0, 4, 8, 24], none, none])
    mixed, own, others, lam = augmentation.mix(x, labels, draws)
    assert own.tolist() == labels.tolist() and others.tolist() == [11, 10, 13, 12, 14]
    assert (mixed[0] == 0.25).all() and (mixed[1] == 1).all()  # 0.75 * 0 + 0.25 * 1; not mixed
    assert (mixed[2, :, :4, 8:24] == 3).all() and (mixed[2] == 3).sum() == 3 * 64 and (mixed[2] == 2).sum() == 3 * 960
    assert (mixed[3] == 0.25 * 3 + 0.75 * 2).all() and (mixed[4] == 4).all()
    assert lam.tolist() == [0.75, 1.0, 0.9375, 0.25, 0.5]


def test_without_mixing_the_batch_is_only_normalised():
    batch = cifar100.made_up(6, 0)
    x, labels, others, lam = augmentation.augment(batch.images, batch.labels, draw(6, generator(), "none"))
    assert torch.equal(x, cifar100.normalise(batch.images)) and (lam == 1).all()
    assert torch.equal(labels, batch.labels) and torch.equal(others, batch.labels)


def test_cutmix_labels_follow_the_box_as_it_is_cut_off_at_the_border():
    draws = draw(2000, generator(), mixing="cutmix")
    x = torch.tensor([0.0, 1.0]).repeat(1000).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    mixed = augmentation.mix(x, torch.zeros(2000).long(), draws)[0]
    assert torch.equal((mixed == x).float().mean((1, 2, 3)), draws.lam) and (draws.weight == 1).all()
    assert (draws.box >= 0).all() and (draws.box <= 32).all()
    height, width = draws.box[:, 1] - draws.box[:, 0], draws.box[:, 3] - draws.box[:, 2]
    assert (height != width).any() and (height == width).any()  # squares, some cut off


def test_mixup_has_no_box_and_its_share_is_the_labels():
    draws = draw(500, generator(), mixing="mixup", mixup_alpha=0.3)
    assert torch.equal(draws.lam, draws.weight)
    assert torch.equal(draws.box[:, 0], draws.box[:, 1]) and torch.equal(draws.box[:, 2], draws.box[:, 3])


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 20.0])
def test_shares_follow_beta(alpha):
    lam = draw(20_000, generator(), mixing="mixup", mixup_alpha=alpha).lam
    assert torch.isfinite(lam).all() and lam.min() >= 0 and lam.max() <= 1
    assert abs(lam.mean() - 0.5) < 0.02  # mean and variance of Beta(alpha, alpha)
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_both_mixes_each_image_one_way_or_the_other():
    draws = draw(4000, generator(), mixing="both", mixup_alpha=1.0)
    mixup, cutmix = draws.weight < 1, (draws.lam < 1) & (draws.weight == 1)
    assert 0.45 < mixup.float().mean() < 0.55 and 0.45 < cutmix.float().mean() < 0.55


@pytest.mark.cuda
def test_a_gpu_gives_what_the_cpu_gives():
    batch = cifar100.made_up(256, 0)
    draws = draw(256, generator(), **EVERYTHING)
    here = augmentation.augment(batch.images, batch.labels, draws)
    there = augmentation.augment(batch.images.cuda(), batch.labels.cuda(), draws)
    assert all(tensor.is_cuda for tensor in there)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here[1:], there[1:]))
    # Sums in another order: the last bit, seldom a level, and very seldom the other of two equally near pixels.
    assert ((here[0] - there[0].cpu()).abs() > 1e-5).float().mean() < 0.01
    assert draw(8, torch.Generator("cuda").manual_seed(0), **EVERYTHING).op.is_cuda


def test_cutmix_draws_the_area_uniformly():
    """Beside boxes that numpy draws as in the paper (Yun et al. 2019): lam from the beta distribution (1, 1)."""
    lam = draw(20_000, torch.Generator().manual_seed(0), mixing="cutmix", mixup_alpha=0.3).lam
    random = np.random.default_rng(0)
    half = (16 * np.sqrt(random.random(20_000)))[:, None].astype(int)
    centre = random.integers(0, 32, (20_000, 2))
    sides = np.clip(centre + half, 0, 32) - np.clip(centre - half, 0, 32)
    assert np.abs(np.sort(lam.numpy()) - np.sort(1 - sides.prod(1) / 1024)).max() < 0.03
