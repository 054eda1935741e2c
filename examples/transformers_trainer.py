"""The Trainer of transformers, and a tiny one that reads digits as sentences. One callback makes it an ensemble.

Run it as `python examples/transformers_trainer.py [directory]`; it takes some seconds on a CPU and downloads nothing.
Kill it and run it again: it resumes from the Trainer's checkpoint, and the ensemble is the same to the last bit.
(`resume=False`: where there is no checkpoint yet, what an older run left is moved aside.)
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from snapcore import CosineCycles
from snapcore_torch import SnapshotEnsemble
from snapcore_torch.transformers import SnapshotCallback

directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/transformers_trainer")
checkpoints = directory / "transformers"
checkpoints.mkdir(parents=True, exist_ok=True)

images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
quarters = nn.functional.avg_pool2d(images.float().view(-1, 1, 8, 8), 2).flatten(1).round().long()
sentences = quarters + 17 * torch.arange(16)  # 16 words, each a position and its brightness from 0 to 16
x, x_test, y, y_test = train_test_split(sentences, labels, test_size=0.3, random_state=0)
train = [{"input_ids": words, "labels": label} for words, label in zip(x, y, strict=True)]

set_seed(0)
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=17 * 16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=10,
        initializer_range=0.1,
    )
)
cycles = CosineCycles(lr=1e-2, steps=480, cycles=4)  # snapcore 1
arguments = TrainingArguments(
    str(checkpoints),
    max_steps=cycles.steps,
    lr_scheduler_type="constant",  # the Trainer always has a scheduler; the callback sets the rate after it
    per_device_train_batch_size=32,
    save_steps=50,
    save_total_limit=1,
    logging_strategy="no",
    disable_tqdm=True,
    report_to=[],
    use_cpu=True,
)
callback = SnapshotCallback(directory / "members", cycles, resume=False)  # snapcore 2: the rates, and the snapshots
trainer = Trainer(model, arguments, train_dataset=train, callbacks=[callback])
trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints))
# snapcore 3: the first member, taken early in training, is left out
ensemble = SnapshotEnsemble.load(directory / "members", model, last=3, output=lambda o: o.logits)

with torch.inference_mode():
    members, together = ensemble.members(x_test), ensemble(x_test)
for name, probabilities in [
    *((f"member {k}", each) for k, each in enumerate(members, 2)),
    ("ensemble", together),
]:
    error = (probabilities.argmax(1) != y_test).double().mean()
    nll = nn.functional.nll_loss(probabilities.log(), y_test)
    print(f"{name}: error {error:.2%}, NLL {nll:.4f}")
