"""The LightningModule of a tokenizer: wires model, objective and optimizer, and computes nothing itself."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from flextok.flextok_wrapper import FlexTok
from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.model.keep_k import default_keep_ks
from flextok.training.fsdp import ShardedStrategy
from flextok.training.objective import PASSES_KEY
from flextok.training.progress import will_be_logged
from flextok.training.randomness import training_generator
from flextok.training.shards import total_norm
from flextok.training.validation import encode_batch, flow_losses, model_inputs

P = ParamSpec("P")
T = TypeVar("T")
Objective = Callable[[FlexTok, DataDict], dict[str, Tensor]]


class TokenizerModule(LightningModule):
    """Optimises a FlexTok against an objective; knows neither how it was built nor how it is judged.

    A batch is `{"image": [batch, 3, height, width] in [-1, 1], "key": list of strings}`, or has `"latents"`,
    `[batch, c, h, w]`, in place of the images: the VAE then encodes nothing.
    """

    def __init__(
        self,
        model: FlexTok,
        objective: Objective,
        optimizer: Callable[[nn.Module], dict[str, Any]],
        *,
        seed: int,
        keep_ks: Sequence[int] | None,
        num_sigmas: int,
    ) -> None:
        """`optimizer` gets the module and returns what `configure_optimizers` may return."""
        super().__init__()
        self.model = model
        self.objective = objective
        self.make_optimizer = optimizer
        self.seed = seed
        self.keep_ks = list(keep_ks) if keep_ks is not None else default_keep_ks(model.num_registers)
        self.num_sigmas = num_sigmas
        self.observed: DataDict = {}
        """What the last training step left for callbacks: `PASSES_KEY`, if the objective writes it, and the tokens."""
        self._gradient_norm: Tensor | None = None

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        rng = training_generator(
            self.seed,
            step=self.trainer.global_step,
            micro_batch=batch_idx % self.trainer.accumulate_grad_batches,
            rank=self.global_rank,
        )
        data = {**model_inputs(self.model, batch), RNG_KEY: rng}
        losses = self.objective(self.model, data)
        self.observed = {key: data[key] for key in (PASSES_KEY, self.model.token_write_key) if key in data}
        if will_be_logged(self.trainer):
            names = {"total": "train/loss"}
            self.log_dict({names.get(name, f"train/{name}"): loss.detach() for name, loss in losses.items()})
        return losses["total"]

    def on_validation_start(self) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.check_validation(self.trainer.num_val_batches)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        encoded = encode_batch(self.model, batch, seed=self.seed)
        losses = flow_losses(
            self.model, encoded, keep_ks=self.keep_ks, num_sigmas=self.num_sigmas, seed=self.seed
        ).mean(1)
        named = {f"val/flow_loss_k{k}": loss for k, loss in zip(self.keep_ks, losses, strict=True)}
        named["val/flow_loss"] = losses.mean()
        self.log_dict(named, batch_size=len(encoded.keys), sync_dist=True)

    def call(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """What a function that uses the model returns; where weights are sharded, all processes have to call it."""
        return function(*args, **options)

    def on_after_backward(self) -> None:
        self._gradient_norm = None

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """The norm over all gradients before clipping, a scalar on their device; computed once in a step."""
        if self._gradient_norm is None:
            parameters = _parameters(optimizer)
            self._gradient_norm = total_norm([p.grad for p in parameters if p.grad is not None])
        return self._gradient_norm

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if will_be_logged(self.trainer):
            self.log("train/grad_norm", self.gradient_norm(optimizer))
            self.log("train/lr", optimizer.param_groups[0]["lr"])
            parts = {group["part"]: group["lr"] for group in optimizer.param_groups if "part" in group}
            self.log_dict({f"train/lr/{part}": lr for part, lr in parts.items()})

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that is known already; Lightning would compute it again, and refuses fused optimizers."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            norm = self.gradient_norm(optimizer)
            torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning would keep the gradients through the next forward pass, where their memory is needed.
        optimizer.zero_grad()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing is left to do before a backward pass: see `optimizer_step`."""

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
