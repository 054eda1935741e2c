"""What six members cost in PyTorch, one after the other, stacked, and as a replayed graph, beside one member."""

from collections.abc import Callable

import torch
from cases import Setting, Suite, lasting
from compare import Contender
from torch import Tensor
from torch_common import DEVICE, GPU, about, awaited, resnet

from snapcore_torch import SnapshotEnsemble

suite = Suite(about())
MEMBERS = 6
STRATEGIES = ("loop", "stacked", "graph") if GPU else ("loop", "stacked")


def predicting(predict: Callable[[Tensor], Tensor], x: Tensor) -> Contender:
    def run() -> None:
        with torch.inference_mode():
            predict(x)

    return lasting(awaited(run))


def warm(ensemble: SnapshotEnsemble, x: Tensor) -> SnapshotEnsemble:
    """Return an ensemble whose first batch, which is checked, is behind it."""
    with torch.inference_mode():
        ensemble(x)
    return ensemble


def compare(setting: Setting, batch: int) -> None:
    torch.manual_seed(0)
    width, blocks = setting.pick(full=(16, (3, 3, 3)), small=(8, (1, 1)), tiny=(4, (1,)))
    side = setting.pick(full=32, small=8, tiny=8)
    batch = setting.pick(full=batch, small=batch, tiny=min(batch, 8))
    models = [resnet(width, blocks, 10).to(DEVICE).eval().requires_grad_(False) for _ in range(MEMBERS)]
    x = torch.randn(batch, 3, side, side, device=DEVICE)
    setting.found |= {
        "members": MEMBERS,
        "batch": batch,
        "side": side,
        "parameters of one": sum(each.numel() for each in models[0].parameters()),
    }
    setting.compare(
        {strategy: predicting(warm(SnapshotEnsemble(models, strategy=strategy), x), x) for strategy in STRATEGIES},
        {"one member": predicting(lambda x: models[0](x).softmax(-1), x)},
    )


@suite.comparison("six members, one example")
def batch_1(setting: Setting) -> None:
    compare(setting, 1)


@suite.comparison("six members, a batch of 32")
def batch_32(setting: Setting) -> None:
    compare(setting, 32)


@suite.comparison("six members, a batch of 1024")
def batch_1024(setting: Setting) -> None:
    compare(setting, 1024)
