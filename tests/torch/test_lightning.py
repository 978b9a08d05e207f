"""``HorovodStrategy`` under Lightning's own Trainer: two ranks, an extension, a checkpoint to go on from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference.spars_ams import top_k
from tests.torch.problems import bits, flat

pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
pytestmark = pytest.mark.distributed


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


RATIO = 0.3
LIMIT = 0.05  # well below every norm, so that all steps are clipped
ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def clipped(way):
    """A training whose gradients are clipped: the weights, and the norms that a hook has seen."""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.precision import MixedPrecision

    import hvd_ext.torch as hvd
    from hvd_ext.lightning import HorovodStrategy

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = way != "manual"
            self.net, self.norms = clipped_net(), []

        def training_step(self, batch, index):
            loss = clipped_loss(self.net, batch[0], self.global_rank)
            if way != "manual":
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, LIMIT, "norm")
            return optimizer.step()

        def on_before_optimizer_step(self, optimizer):
            self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)

    scaled = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]}
    options = {"compression": hvd.Compression.topk(RATIO, min_size=0)} if way == "topk" else {}
    trainer = pl.Trainer(strategy=HorovodStrategy(**options), accelerator="cpu", devices=1, max_epochs=1,
                         logger=False,
                         enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                         use_distributed_sampler=False, **(scaled if way == "16-mixed" else {}),
                         **({} if way == "manual" else {"gradient_clip_val": LIMIT}),
                         accumulate_grad_batches=2 if way == "accumulated" else 1)
    model = Module()
    data = torch.utils.data.TensorDataset(ROWS[hvd.rank()::2])
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    return [p.tolist() for p in model.net.parameters()], model.norms


def clipped_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()


def clipped_loss(net, rows, rank):
    with torch.autocast("cpu", enabled=False):
        return net(rows).pow(2).mean() * (1 + 2 * rank)  # norms that differ by rank


def clipped_by_one_process(passes):
    net, norms = clipped_net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for step in range(4 // passes):
        optimizer.zero_grad()
        for number in range(passes * step, passes * (step + 1)):
            for rank in range(2):
                rows = ROWS[rank::2][4 * number:4 * number + 4]
                (clipped_loss(net, rows, rank) / (2 * passes)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), LIMIT)))
        optimizer.step()
    return [p.tolist() for p in net.parameters()], norms


@pytest.mark.parametrize("way", ["automatic", "accumulated", "manual", "16-mixed"])
def test_clipping_sees_reduced_gradients(ranks, way):
    first, second = ranks(2).run(clipped, way, timeout=120)
    assert first == second
    weights, norms = clipped_by_one_process(2 if way == "accumulated" else 1)
    for found, wanted in zip(first[0], weights, strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-9, atol=1e-12)
    if way != "manual":
        assert first[1] == pytest.approx(norms, rel=1e-9)


def clipped_after_topk():
    """The same as ``clipped_by_one_process``, where each rank sends the largest of its g + e."""
    net, norms = clipped_net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    sizes = [p.numel() for p in net.parameters()]
    residuals = np.zeros((2, sum(sizes)))
    for step in range(4):
        mean = np.zeros(sum(sizes))
        for rank in range(2):
            loss = clipped_loss(net, ROWS[rank::2][4 * step:4 * step + 4], rank)
            residuals[rank] += flat(torch.autograd.grad(loss, list(net.parameters())))
            chosen = top_k(residuals[rank], round(RATIO * sum(sizes)))
            mean[chosen] += residuals[rank, chosen] / 2
            residuals[rank, chosen] = 0
        for parameter, part in zip(net.parameters(), torch.from_numpy(mean).split(sizes), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), LIMIT)))
        optimizer.step()
    return [p.tolist() for p in net.parameters()], norms


def test_clipping_sees_what_topk_has_reduced(ranks):
    first, second = ranks(2).run(clipped, "topk", timeout=120)
    assert first == second
    weights, norms = clipped_after_topk()
    # TopK's values travel as float32: half of 2^-23 of at most LIMIT in four steps, times rate and momentum.
    tolerance = 4 * 2.0**-24 * LIMIT * 0.5 / (1 - 0.9)
    for found, wanted in zip(first[0], weights, strict=True):
        np.testing.assert_allclose(flat([found]), flat([wanted]), rtol=0, atol=tolerance)
    np.testing.assert_allclose(first[1], norms, rtol=1e-6)


def refused():
    from hvd_ext.lightning import HorovodStrategy

    with pytest.raises(ValueError, match="steps with a closure; use server='replicated'"):
        HorovodStrategy(server="sharded")
    return True


def test_servers_that_cannot_be_used(ranks):
    assert ranks(2).run(refused) == [True, True]
