"""An ordinary PyTorch loop on scikit-learn's digits. Three lines (and two imports) make it an ensemble of five.

Run it as `python examples/torch_loop.py [directory]`; it takes a few seconds on a CPU.
"""

import sys

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from snapcore import CosineCycles
from snapcore_torch import SnapshotEnsemble, SnapshotRun

directory = sys.argv[1] if len(sys.argv) > 1 else "runs/torch_loop"
torch.manual_seed(0)
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
x, x_test, y, y_test = train_test_split(images.float() / 16, labels, test_size=0.5, random_state=0)
loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
cycles = CosineCycles(lr=0.2, steps=30 * len(loader), cycles=5)

with SnapshotRun(directory, cycles, model, optimizer, resume=False) as run:  # snapcore 1: an older run is moved aside
    for _ in range(30):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            run.step()  # snapcore 2: sets the next rate; at the end of a cycle, takes a snapshot
ensemble = SnapshotEnsemble.load(directory, model)  # snapcore 3: a module that gives probabilities

members = ensemble.members(x_test)
for name, probabilities in [
    *((f"member {k}", each) for k, each in enumerate(members, 1)),
    ("ensemble", ensemble(x_test)),
]:
    error = (probabilities.argmax(1) != y_test).double().mean()
    nll = nn.functional.nll_loss(probabilities.log(), y_test)
    print(f"{name}: error {error:.2%}, NLL {nll:.4f}")
