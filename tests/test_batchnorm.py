import copy

import pytest
import torch
from torch import nn

from compressed import cifar100, threads
from training import augmentation, batchnorm, cpu_kernels


def test_renewed_statistics_do_not_depend_on_the_threads(monkeypatch):
    """Three batches for two threads: their means count as many images as they are of."""
    data, found = cifar100.made_up(750, 0), []
    for cores in (1, 2):
        monkeypatch.setattr(threads, "cores", lambda: cores)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
        with torch.no_grad():
            model[0].weight.copy_(torch.linspace(-1, 1, 12).view(4, 3, 1, 1))
            model[0].bias.zero_()
        batchnorm.renew_statistics(model, data, 750, "plain", torch.Generator().manual_seed(0))
        found.append(model[1])
    assert not found[0].training and found[0].running_mean.abs().max() > 1e-3
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("augment", ("none", "plain"))
def test_statistics_are_those_of_augmented_images(augment):
    data, norm = cifar100.made_up(200, 0), nn.BatchNorm2d(3)
    batchnorm.renew_statistics(nn.Sequential(norm), data, 200, augment, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(200, generator=generator)
    seen = augmentation.augment(data.images[chosen], data.labels[chosen], augmentation.draw(200, generator, augment))[0]
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), rtol=1e-3, atol=0)
    same = torch.allclose(norm.running_mean, cifar100.normalise(data.images).mean((0, 2, 3)), atol=1e-3)
    assert same == (augment == "none")


def test_statistics_are_the_mean_over_all_batches(monkeypatch):
    """Two batches of one thread, of a BatchNorm in a convolution's output, whichever function computes it."""
    monkeypatch.setattr(threads, "cores", lambda: 1)
    data, model = cifar100.made_up(500, 0), nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    found = []
    for fast in (False, True):
        each = copy.deepcopy(model)
        if fast:
            each[1].__class__ = cpu_kernels.BatchNorm
        batchnorm.renew_statistics(each, data, 500, "none", torch.Generator().manual_seed(0))
        found.append(each[1].running_mean)
    with torch.no_grad():
        wanted = model[0](cifar100.normalise(data.images)).mean((0, 2, 3))
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_random_is_off(monkeypatch):
    """As it is when the statistics are used; and two threads would draw from one generator."""
    monkeypatch.setattr(threads, "cores", lambda: 2)
    data, found = cifar100.made_up(500, 0), []
    for rate in (0.0, 0.5):
        model = nn.Sequential(nn.Dropout(rate), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3)).train()
        nn.init.ones_(model[1].weight), nn.init.zeros_(model[1].bias)
        batchnorm.renew_statistics(model, data, 500, "plain", torch.Generator().manual_seed(0))
        found.append(model[2])
    assert torch.equal(found[0].running_var, found[1].running_var) and found[1].momentum == 0.3


class Ghost(nn.BatchNorm2d):
    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.mean((0, 2, 3)), 1.0 * self.momentum)
        return x - self.running_mean[:, None, None]


def test_a_batchnorm_of_ones_own_is_renewed(monkeypatch):
    """Its forward pass needs a number for the momentum."""
    monkeypatch.setattr(threads, "cores", lambda: 1)
    data, norm = cifar100.made_up(500, 0), Ghost(3, momentum=0.3)
    batchnorm.renew_statistics(nn.Sequential(norm), data, 500, "none", torch.Generator().manual_seed(0))
    wanted = cifar100.normalise(data.images).mean((0, 2, 3))
    assert torch.allclose(norm.running_mean, wanted, atol=1e-5) and norm.momentum == 0.3


def test_frozen_statistics_stay():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    model = Frozen(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()
    batchnorm.renew_statistics(model, cifar100.made_up(300, 0), 300, "none", torch.Generator().manual_seed(0))
    assert not model[1].running_mean.any() and model[2].running_mean.any() and not model.training


@pytest.mark.parametrize("images", (1, 251))
def test_no_batch_has_a_single_image(images):
    """Of one image with maps of 1x1 there is no variance."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    batchnorm.renew_statistics(model, cifar100.made_up(251, 0), images, "none", torch.Generator().manual_seed(0))
    assert model[1].running_mean.isfinite().all() and model[1].running_var.isfinite().all()


def test_renewed_means_leave_the_variances():
    data, found = cifar100.made_up(500, 0), []
    for renew in (batchnorm.renew_statistics, batchnorm.renew_means):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
        renew(model, data, 500, "plain", torch.Generator().manual_seed(0))
        found.append(model[1])
    assert not found[1].training and found[0].running_mean.abs().max() > 1e-3
    assert torch.equal(found[0].running_mean, found[1].running_mean)
    assert torch.equal(found[1].running_var, torch.ones(4)) and not torch.equal(found[0].running_var, torch.ones(4))
