"""Lightning's Trainer on scikit-learn's digits. One callback makes it an ensemble of five.

Run it as `python examples/lightning_fit.py [directory]`; it takes a few seconds on a CPU. Kill it and run it again: it
resumes from Lightning's checkpoint, and the ensemble is the same to the last bit. (`resume=False`: where there is no
checkpoint yet, what an older run left is moved aside.)
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from snapcore import CosineCycles
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.lightning import SnapshotCallback

directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lightning_fit")
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
x, x_test, y, y_test = train_test_split(images.float() / 16, labels, test_size=0.5, random_state=0)


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, inputs):
        return self.network(inputs)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):  # no scheduler: the callback sets the rate
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, nesterov=True)


pl.seed_everything(0)
module = Digits()
data = TensorDataset(x, y)
order = DistributedSampler(data, num_replicas=1, rank=0)  # shuffles by the epoch's number: the same after a kill
loader = DataLoader(data, batch_size=32, sampler=order)
cycles = CosineCycles(lr=0.2, steps=30 * len(loader), cycles=5)  # snapcore 1
last = directory / "lightning" / "last.ckpt"
trainer = pl.Trainer(
    max_epochs=30,
    callbacks=[
        SnapshotCallback(directory / "members", cycles, resume=False),  # snapcore 2: the rates, and the snapshots
        ModelCheckpoint(last.parent, filename="last", every_n_epochs=4, enable_version_counter=False),
    ],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
)
trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
ensemble = SnapshotEnsemble.load(directory / "members", module)  # snapcore 3: a module that gives probabilities

members = ensemble.members(x_test)
for name, probabilities in [
    *((f"member {k}", each) for k, each in enumerate(members, 1)),
    ("ensemble", ensemble(x_test)),
]:
    error = (probabilities.argmax(1) != y_test).double().mean()
    nll = nn.functional.nll_loss(probabilities.log(), y_test)
    print(f"{name}: error {error:.2%}, NLL {nll:.4f}")
