"""One of several workers that train one model: `python one_of_several.py directory [update signal]`, with TF_CONFIG.

Without TF_CONFIG it trains alone. After that update the worker sends itself the signal. It prints a digest of the
weights that it ends with.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

from snapcore import program
from snapcore.data import TrainingData
from snapcore.run import execute
from snapcore_tensorflow.backend import TensorFlowBackend
from snapcore_tensorflow.distributed import current_group

directory, *end = sys.argv[1:]
strategy = tf.distribute.MultiWorkerMirroredStrategy() if "TF_CONFIG" in os.environ else None  # before all else
random = np.random.default_rng(0)
y = np.arange(96) % 4
x = (random.normal(size=(96, 1, 8, 8)) + np.eye(4, 64)[y].reshape(96, 1, 8, 8)).astype(np.float32)


class UntilTheEnd:
    """The data, until the update that the worker does not outlive."""

    def __init__(self, data):
        self._data = data
        self.x, self.y, self.n_classes = data.x, data.y, data.n_classes
        self.loss, self.ignore, self.n_outputs = data.loss, data.ignore, data.n_outputs

    def indices(self, start, stop):
        if end and start <= int(end[0]) < stop:
            os.kill(os.getpid(), getattr(signal, end[1]))
        return self._data.indices(start, stop)


group = current_group(strategy)
state = execute(
    program("snapshot", lr=0.1, steps=120, cycles=3),
    TensorFlowBackend(),
    model="mlp",
    data=UntilTheEnd(TrainingData(x, y, 4, batch_size=16, seed=5)),
    directory=directory,
    resume_every=10,
    group=group,
    strategy=strategy,
)
weights = TensorFlowBackend().capture(state).resolve()
digest = hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights)))
said = {"digest": digest.hexdigest(), "updates": int(state.optimizer.iterations.numpy())}
if group is not None:
    said["heard"] = group.gather({"längere": "Wörter" * (1 + group.rank)})
    # A worker that ends closes its connections, and another may still be fetching what was gathered.
    cluster = json.loads(os.environ["TF_CONFIG"])["cluster"]
    port = cluster.get("chief", cluster["worker"])[0].rpartition(":")[2]
    ended = Path(directory).with_name("log") / f"ended {port}"
    ended.mkdir(exist_ok=True)
    (ended / str(group.rank)).touch()
    latest = time.monotonic() + 30
    while len(list(ended.iterdir())) < group.size and time.monotonic() < latest:
        time.sleep(0.01)
print(json.dumps(said))
