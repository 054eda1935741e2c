"""What the parts on PyTorch share: the device, networks, and a state's bytes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def about() -> dict[str, Any]:
    """Return what a number measured here depends on."""
    found: dict[str, Any] = {"torch": torch.__version__, "gpu": GPU, "device": "cpu", "no_gpu": "no CUDA device"}
    if GPU:
        device = torch.cuda.get_device_properties(0)
        found |= {
            "device": device.name,
            "memory": device.total_memory,
            "capability": f"{device.major}.{device.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def synchronize() -> None:
    """Wait for the stream that trains, and not for what is fetched beside it."""
    if GPU:
        torch.cuda.current_stream().synchronize()


def awaited(run: Callable[[], object]) -> Callable[[], None]:
    """Return what calls `run` and waits for the device."""

    def wait() -> None:
        run()
        synchronize()

    return wait


def bits(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return a state's bytes, once the device has computed them."""
    return {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in state.items()
    }


def dense(width: int, layers: int, *, dropout: float = 0.0) -> nn.Module:
    """Return dense layers of one width, always with the same weights; with dropout, normalised too."""
    parts: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(layers):
            parts += [nn.Linear(width, width), nn.ReLU()]
            if dropout:
                parts += [nn.BatchNorm1d(width), nn.Dropout(dropout)]
        return nn.Sequential(*parts, nn.Linear(width, 10)).to(DEVICE)


class Bottleneck(nn.Module):
    """A residual block: 1×1, 3×3, 1×1."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.body = nn.Sequential(
            *(normalised(before, width, 1), nn.ReLU()),
            *(normalised(width, width, 3, stride), nn.ReLU()),
            normalised(width, after, 1),
        )
        plain = before == after and stride == 1
        self.shortcut = nn.Identity() if plain else normalised(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def normalised(before: int, after: int, side: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(before, after, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after))


def resnet(width: int, blocks: Iterable[int], n_classes: int, *, stem: int = 3) -> nn.Module:
    """Return a residual network of bottlenecks; `resnet(64, (3, 4, 6, 3), 1000, stem=7)` is ResNet-50.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, table 1.
    """
    parts: list[nn.Module] = [normalised(3, width, stem, 2 if stem > 3 else 1), nn.ReLU()]
    if stem > 3:
        parts.append(nn.MaxPool2d(3, 2, padding=1))
    before = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            parts.append(Bottleneck(before, width << stage, 2 if stage and not block else 1))
            before = 4 * (width << stage)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, n_classes))
