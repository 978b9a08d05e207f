"""``HorovodStrategy`` under Lightning's own Trainer: two ranks, an extension, a checkpoint to go on from."""

from __future__ import annotations

import pytest
import torch

from tests.torch.problems import bits

pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
pytestmark = pytest.mark.ranks


def strategy(case):
    import hvd_ext.torch as hvd
    from hvd_ext.lightning import HorovodStrategy

    return {"plain": lambda: HorovodStrategy(),
            "topk": lambda: HorovodStrategy(compression=hvd.Compression.topk(0.25, min_size=0)),
            "seng": lambda: HorovodStrategy(
                preconditioner=lambda module: hvd.SENG(module.net, damping=0.3, update_freq=3))}[case]()


def module():
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

        def training_step(self, batch, index):
            x, y = batch
            loss = torch.nn.functional.mse_loss(self.net(x), y)
            self.log("loss", loss, on_epoch=True, sync_dist=True)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]

    return Module()


def fit(case, folder, epochs, resume=None):
    import lightning.pytorch as pl

    import hvd_ext.torch as hvd

    torch.manual_seed(hvd.rank())  # the weights must come from rank 0
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 6, generator=generator),
                                          torch.randn(32, 3, generator=generator))
    model = module()
    trainer = pl.Trainer(strategy=strategy(case), accelerator="cpu", devices=1, max_epochs=epochs,
                         enable_progress_bar=False, enable_model_summary=False, logger=False,
                         enable_checkpointing=False, default_root_dir=folder, log_every_n_steps=1)
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume)
    trainer.save_checkpoint(f"{folder}/{case}{epochs}.ckpt")
    optimizer = trainer.optimizers[0]
    assert type(optimizer).__name__ == "SGD"
    assert trainer.world_size == 2
    assert trainer.global_step == 4 * epochs  # each rank has half of the data
    return (bits(model.parameters()), optimizer.report().get("steps"), optimizer.param_groups[0]["lr"],
            float(trainer.callback_metrics["loss_epoch"]))


@pytest.mark.parametrize("case", ["plain", "topk", "seng"])
def test_fit_and_go_on_from_a_checkpoint(ranks, tmp_path, case):
    pool = ranks(2)
    whole = pool.run(fit, case, str(tmp_path), 3, timeout=120)
    assert whole[0] == whole[1]
    pool.run(fit, case, str(tmp_path), 1)
    went_on = pool.run(fit, case, str(tmp_path), 3, str(tmp_path / f"{case}1.ckpt"))
    assert went_on == whole
    if case == "topk":
        assert whole[0][1] == 12


def refused():
    from hvd_ext.lightning import HorovodStrategy

    with pytest.raises(ValueError, match="steps with a closure; use server='replicated'"):
        HorovodStrategy(server="sharded")
    return True


def test_servers_that_cannot_be_used(ranks):
    assert ranks(2).run(refused) == [True, True]
