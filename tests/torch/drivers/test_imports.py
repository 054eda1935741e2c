"""The trainers are optional, and Lightning goes by two names."""

import importlib
import sys

import lightning.pytorch as lightning
import pytest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .training import SIXTY, assert_members, examples, network, plain_loop, sgd


@pytest.fixture
def imported_again(monkeypatch):
    """Import one of our modules again, with modules hidden (None) or as they are."""

    def imported(name, **hidden):
        for module, instead in hidden.items():
            monkeypatch.delitem(sys.modules, module.replace("__", "."), raising=False)
            if instead is None:
                monkeypatch.setitem(sys.modules, module.split("__")[0], None)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return imported


def test_without_transformers_the_error_says_which_extra_brings_it(imported_again):
    with pytest.raises(ModuleNotFoundError, match=r"needs transformers: pip install 'snapcore\[transformers\]'"):
        imported_again("snapcore_torch.transformers", transformers=None)


def test_without_lightning_the_error_says_which_extra_brings_it(imported_again):
    with pytest.raises(ModuleNotFoundError, match=r"needs PyTorch Lightning: pip install 'snapcore\[lightning\]'"):
        imported_again("snapcore_torch.lightning", lightning__pytorch=None, pytorch_lightning=None)


class Broken:
    """Finds modules that cannot be imported because they lack another."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError("No module named 'other'", name="other")


def test_a_lightning_that_is_there_but_lacks_something_itself_says_what_it_lacks(imported_again, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [Broken("lightning.pytorch", "pytorch_lightning"), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="'other'"):
        imported_again("snapcore_torch.lightning", lightning__pytorch="broken", pytorch_lightning="broken")


def test_a_transformers_that_is_there_but_lacks_something_itself_says_what_it_lacks(imported_again, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [Broken("transformers"), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="'other'"):
        imported_again("snapcore_torch.transformers", transformers="broken")


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_it_works_under_lightnings_older_name_too(imported_again, tmp_path):
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return sgd(self)

    callback = imported_again("snapcore_torch.lightning", lightning__pytorch="unloaded").SnapshotCallback
    assert issubclass(callback, pytorch_lightning.Callback)
    trainer = pytorch_lightning.Trainer(
        max_steps=60,
        max_epochs=-1,
        callbacks=[callback(tmp_path, SIXTY)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(*examples()), batch_size=6))
    assert_members(tmp_path, plain_loop(), "network.")


def test_where_both_names_are_in_use_the_callback_is_one_of_each(imported_again):
    import pytorch_lightning

    callback = imported_again("snapcore_torch.lightning").SnapshotCallback
    assert issubclass(callback, (lightning.Callback))
    assert issubclass(callback, pytorch_lightning.Callback)
