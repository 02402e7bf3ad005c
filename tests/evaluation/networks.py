"""Small networks that judge, for configs of tests; they count how many images they have seen."""

import os
import signal

import torch
from torch import nn

FUSE = "FLEXTOK_TEST_FUSE"


class Pooled(nn.Module):
    """The means of 2 x 2 regions and their products: 24 features."""

    images_seen = 0

    def __init__(self, gain=1.0):
        super().__init__()
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, images):
        assert not self.training
        type(self).images_seen += len(images)
        means = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return self.gain * torch.cat([means, means * means.roll(1, dims=1)], dim=1)


class LargestDifference(nn.Module):
    def forward(self, x, y):
        return (x - y).abs().amax(dim=(1, 2, 3), keepdim=True)


class Flat(nn.Module):
    def forward(self, images):
        return images


class ScriptedInception(nn.Module):
    """Called like NVIDIA's file."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 2, stride=2)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        assert return_features
        return self.layer((img.float() - 128) / 128).relu().mean(dim=(2, 3))


def write_inception(file):
    torch.manual_seed(4)
    torch.jit.script(ScriptedInception()).save(file)
    return file


class Fuse(nn.Module):
    """A distance that kills its process without a word the n-th time, where the environment says so."""

    def __init__(self):
        super().__init__()
        self.calls_left = int(os.environ.get(FUSE, "0"))

    def forward(self, x, y):
        self.calls_left -= 1
        if self.calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return (x - y).abs().mean(dim=(1, 2, 3))
