"""Augment whole batches of training images on their device, every image with its own random parameters.

A training step first draws the parameters of the whole batch (`draw`) and then applies them to the images (`augment`).
One of several processes draws for the whole batch and applies its slice, so that all processes together compute what a
single one would.
"""
import dataclasses

import torch
import torch.nn.functional as F

from compressed.cifar100 import IMAGE_SIZE, normalise

# ----------------------------------------------------------------------------------------------------------- draws

PAD = 4
OPS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
       "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")
(IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, COLOR, CONTRAST,
 SHARPNESS, POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE) = range(len(OPS))
BINS = 31
# The 31 strengths of each operation, from none to full (TrivialAugment, wide): shears in pixels per pixel,
# translations in pixels, rotation in degrees, Brightness to Sharpness as a change of the blending factor 1, Posterize
# in bits that are kept, Solarize as a threshold.
MAGNITUDES = torch.zeros(len(OPS), BINS)
MAGNITUDES[[SHEAR_X, SHEAR_Y, BRIGHTNESS, COLOR, CONTRAST, SHARPNESS]] = torch.linspace(0, 0.99, BINS)
MAGNITUDES[[TRANSLATE_X, TRANSLATE_Y]] = torch.linspace(0, 32, BINS)
MAGNITUDES[ROTATE] = torch.linspace(0, 135, BINS)
MAGNITUDES[POSTERIZE] = 8 - (torch.arange(BINS) / ((BINS - 1) / 6)).round()
MAGNITUDES[SOLARIZE] = torch.linspace(255, 0, BINS)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Hold the random parameters with which `augment` changes each of `count` images.

    Each field is a tensor with one row per image, or None if that step is off. `draws[a:b]` are the parameters of the
    images a to b - 1 of the batch.
    """
    count: int
    top: torch.Tensor | None = None  # int64 [N], 0 to 8: the crop's corner in the image padded by 4
    left: torch.Tensor | None = None
    flip: torch.Tensor | None = None  # bool [N]
    op: torch.Tensor | None = None  # int64 [N]: an index in OPS
    magnitude: torch.Tensor | None = None  # float32 [N], signed
    lam: torch.Tensor | None = None  # float32 [N]: weight of the image's own label; the partner's has 1 - lam
    weight: torch.Tensor | None = None  # float32 [N]: weight of the image's own pixels outside the box
    box: torch.Tensor | None = None  # int64 [N, 4]: top, bottom, left, right of the box with the partner's pixels

    def __len__(self):
        return self.count

    def __getitem__(self, part: slice) -> "Draws":
        start, stop, step = part.indices(self.count)
        if step != 1 or self.lam is not None and (start % 2 or stop % 2 and stop != self.count):
            raise ValueError(f"draws[{start}:{stop}:{step}] would separate an image from its mixing partner")
        _, *tensors = vars(self).values()
        return Draws(max(0, stop - start), *(None if tensor is None else tensor[start:stop] for tensor in tensors))


def draw(n: int, generator: torch.Generator, augment: str = "plain", mixing: str = "none",
         mixup_alpha: float = 0.3) -> Draws:
    """Draw independent augmentation parameters for each of n images, on the generator's device.

    augment: none; plain: random crop and flip; or trivial: TrivialAugment, too. mixing: none, mixup, cutmix, or both
    (either with probability 1/2 for each image); the share is drawn from Beta(mixup_alpha, mixup_alpha), that of CutMix
    from Beta(1, 1).

    Prefer a generator on the CPU, even for CUDA training: the draws are then the same on both, and `trivial_augment`
    can assign images to operations without waiting for the GPU.
    """
    device, drawn = generator.device, {}

    def integers(below, *shape):
        return torch.randint(below, (n, *shape), generator=generator, device=device)

    def beta(alpha):
        # torch.distributions.Beta calls this too, but takes no generator. float64: small alphas give values near 0, 1.
        shape = torch.full((n, 2), alpha, dtype=torch.float64, device=device)
        return torch._sample_dirichlet(shape, generator)[:, 0]

    if augment != "none":
        drawn |= {"top": integers(2 * PAD + 1), "left": integers(2 * PAD + 1), "flip": integers(2).bool()}
    if augment == "trivial":
        op = integers(len(OPS))
        sign = torch.where(op < POSTERIZE, 1 - 2 * integers(2), 1)  # operations from Posterize on have no direction
        drawn |= {"op": op, "magnitude": MAGNITUDES.to(device)[op, integers(BINS)] * sign}
    if mixing != "none":
        cut = integers(2).bool() if mixing == "both" else torch.full((n,), mixing == "cutmix", device=device)
        torch.rand(n, generator=generator, device=device)  # unused: keeps the draws of a seed as they were
        lam = torch.where(cut, beta(1.0), beta(mixup_alpha))
        # CutMix (Yun et al. 2019): a box with the share 1 - lam of the area around a random pixel, clipped at the
        # border; lam is then recomputed from the clipped box. Without CutMix the box is empty.
        half = torch.where(cut, 0.5 * (1 - lam).sqrt() * IMAGE_SIZE, 0.0).long()[:, None]
        centre = integers(IMAGE_SIZE, 2)
        low, high = (centre - half).clamp(min=0), (centre + half).clamp(max=IMAGE_SIZE)
        kept = 1 - (high - low).prod(1) / IMAGE_SIZE**2
        drawn |= {"lam": torch.where(cut, kept, lam).float(), "weight": torch.where(cut, 1.0, lam).float(),
                  "box": torch.stack((low, high), 2).flatten(1)}
    return Draws(n, **drawn)


# --------------------------------------------------------------------------------------------------------- augment

def augment(images: torch.Tensor, labels: torch.Tensor, draws: Draws):
    """Return a training batch: images cropped, flipped, TrivialAugmented, normalised and mixed by the given draws.

    images uint8 [N, 3, 32, 32], labels int64 [N] -> (x float32 [N, 3, 32, 32], labels [N], labels of the mixing
    partners [N], lam float32 [N]), all on the images' device; x is channels-last. The loss of an image is
    lam * loss(label) + (1 - lam) * loss(partner's label).
    """
    if len(draws) != len(images):
        raise ValueError(f"{len(draws)} draws for {len(images)} images")
    images = trivial_augment(crop_flip(images, draws), draws)
    x, *others = mix(normalise(images), labels, draws)
    return x.contiguous(memory_format=torch.channels_last), *others


def crop_flip(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Crop 32x32 pixels of each image padded with 4 black pixels, and flip some: uint8 [N, 3, 32, 32] -> the same."""
    if draws.top is None:
        return images
    top, left, flip = on(images.device, draws.top, draws.left, draws.flip)
    pixel = torch.arange(IMAGE_SIZE, device=images.device)
    rows = top[:, None] + pixel
    columns = left[:, None] + torch.where(flip[:, None], pixel.flip(0), pixel)
    return pick(F.pad(images, [PAD] * 4), rows[:, :, None], columns[:, None, :])


def on(device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors on a device; the CPU does not wait for the copies."""
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def pick(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Gather pixels, [N, C, H, W] -> [N, C, 32, 32]: pixel (y, x) of image n is that at rows, columns[n, y, x]."""
    index = (rows * images.shape[3] + columns).flatten(1)[:, None]
    picked = images.flatten(2).gather(2, index.expand(-1, images.shape[1], -1))
    return picked.unflatten(2, (IMAGE_SIZE, IMAGE_SIZE))


def trivial_augment(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Apply one operation with its own strength to each image: uint8 [N, 3, 32, 32] -> the same.

    Müller and Hutter, "TrivialAugment", ICCV 2021. Operations and ranges are those of torchvision's TrivialAugmentWide
    (31 strengths, nearest pixel, black outside). The operations but Identity form three families, and each family
    processes its images at once. The lists of images are made on the draws' device: if that is the CPU, nothing waits
    for the GPU.
    """
    if draws.op is None:
        return images
    out = images.clone()
    for family, first, last in (warp, SHEAR_X, ROTATE), (blend, BRIGHTNESS, SHARPNESS), (relevel, POSTERIZE, EQUALIZE):
        mine = ((draws.op >= first) & (draws.op <= last)).nonzero().squeeze(1)
        if len(mine):
            mine, op, magnitude = on(images.device, mine, draws.op[mine], draws.magnitude[mine])
            out[mine] = family(images[mine], op[:, None, None], magnitude[:, None, None])
    return out


def select(op, others, values: dict):
    """Return values[op] for each image, and `others` for operations that are not listed."""
    for known, value in values.items():
        others = torch.where(op == known, value, others)
    return others


# The families take images uint8 [N, 3, 32, 32], op and magnitude [N, 1, 1], and return the changed images.


def warp(images, op, magnitude):
    """Apply ShearX, ShearY, TranslateX, TranslateY or Rotate, as one affine map of pixel positions per image."""
    def only(wanted, value):
        return torch.where(op == wanted, value, 0.0)

    centre = (IMAGE_SIZE - 1) / 2
    x = torch.arange(IMAGE_SIZE, device=images.device) - centre  # relative to the centre of rotation
    y = x[:, None]
    angle = only(ROTATE, magnitude.deg2rad())
    shear_x, shear_y = only(SHEAR_X, magnitude), only(SHEAR_Y, magnitude)
    # Shears keep the image's top or left edge in place, 16 pixels from the centre. Translations are whole pixels.
    source_x = angle.cos() * x - angle.sin() * y + shear_x * (y + IMAGE_SIZE / 2) - only(TRANSLATE_X, magnitude.trunc())
    source_y = angle.sin() * x + angle.cos() * y + shear_y * (x + IMAGE_SIZE / 2) - only(TRANSLATE_Y, magnitude.trunc())
    # in the image padded by 1: positions outside read its black border
    rows, columns = ((source + centre).round().long() + 1 for source in (source_y, source_x))
    return pick(F.pad(images, [1] * 4), rows.clamp(0, IMAGE_SIZE + 1), columns.clamp(0, IMAGE_SIZE + 1))


def blend(images, op, magnitude):
    """Apply Brightness, Color, Contrast or Sharpness: move away from (or towards) black, grey, mean grey or a blur."""
    op, magnitude = op[:, None], magnitude[:, None]  # [N, 1, 1, 1]
    x = images.float()
    grey = (0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).floor_()
    # The blur weights a pixel's eight neighbours by 1/13 and the pixel itself by 5/13; border pixels stay unchanged.
    # It uses shifts instead of a convolution, because sums of whole numbers are exact under autocast too.
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    square = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    blurred = x.clone()
    blurred[..., 1:-1, 1:-1] = ((square + 4 * x[..., 1:-1, 1:-1]) / 13).round_()
    plain = select(op, 0.0, {COLOR: grey, CONTRAST: grey.mean((1, 2, 3), keepdim=True), SHARPNESS: blurred})
    return (x + magnitude * (x - plain)).clamp_(0, 255).to(torch.uint8)


def relevel(images, op, magnitude):
    """Apply Posterize, Solarize, AutoContrast or Equalize, by a table of 256 new levels per channel of each image."""
    pixels = images.flatten(2).long()
    level = torch.arange(256, device=images.device)
    low, high = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
    flat = low == high

    posterized = level & -(2 ** (8 - magnitude.clamp(2, 8)).long())  # clamp: of other operations
    solarized = torch.where(level >= magnitude, 255 - level, level)
    stretched = ((level - low) / ((high - low).float() * (1 / 255)).masked_fill(flat, 1)).clamp(0, 255).long()
    stretched = torch.where(flat, level, stretched)

    # Equalize as in Pillow: a level's new value is the number of darker pixels divided by a 255th of the number of all
    # pixels that are not the brightest.
    count = torch.zeros(*pixels.shape[:2], 256, dtype=torch.long, device=images.device)
    count.scatter_add_(2, pixels, torch.ones_like(pixels))
    darker = count.cumsum(2) - count
    step = darker.gather(2, high) // 255
    equalized = ((darker + step // 2) // step.clamp(min=1)).clamp(0, 255)
    equalized = torch.where(step == 0, level, equalized)

    table = select(op, solarized, {POSTERIZE: posterized, AUTO_CONTRAST: stretched, EQUALIZE: equalized})
    return table.to(torch.uint8).gather(2, pixels).view_as(images)


def mix(x: torch.Tensor, labels: torch.Tensor, draws: Draws):
    """Mix each image with its neighbour (0 with 1, 2 with 3, ...) by mixup (Zhang et al. 2018) or CutMix.

    x float32 [N, C, 32, 32] and labels int64 [N] -> (mixed x, labels, labels of the partners, lam float32 [N]). The
    last image of an odd batch is its own partner. Batches are in random order, so a neighbour is as good as a random
    partner, and it is always in the same process.
    """
    if draws.lam is None:
        return x, labels, labels, torch.ones(len(x), device=x.device)
    lam, weight, box = on(x.device, draws.lam, draws.weight, draws.box)
    partner = torch.arange(len(x), device=x.device) ^ 1
    partner.clamp_(max=len(x) - 1)
    pixel = torch.arange(IMAGE_SIZE, device=x.device)
    rows = (pixel >= box[:, 0:1]) & (pixel < box[:, 1:2])
    columns = (pixel >= box[:, 2:3]) & (pixel < box[:, 3:4])
    share = weight[:, None, None].masked_fill(rows[:, :, None] & columns[:, None, :], 0)
    return torch.lerp(x[partner], x, share[:, None]), labels, labels[partner], lam  # lerp is exact at both ends
