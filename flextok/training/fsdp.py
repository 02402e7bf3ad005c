"""FSDP2: each process keeps a part of every weight, of its gradient, average and moments; blocks are whole while used.

Sharded are all parameters of a TokenizerModule but those of the VAE: each block of the trunks on its own, and what is
left together.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from flextok.model.trunks.transformers import trunk_blocks
from flextok.training.checkpoint_files import beside, put_in_place, refusals_explained, remove
from flextok.training.checkpoints import read_checkpoint
from flextok.training.distributed import by_rank_zero, of_all_ranks
from flextok.training.sharded_checkpoint import write_sharded
from flextok.training.shards import sharded_like

# During these the weights outside of the blocks are whole.
_FORWARDS = ("training_step", "validation_step", "call")


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with all processes in one mesh, and checkpoints as any other run writes them.

    Lightning's own leave all but weights and optimizer to rank 0, so that an average could not be sharded; they are
    read with pickle, and written over the last one.
    """

    # As of a run without shards. Nothing is gathered: the tensors in these are the parts.
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    optimizer_state = Strategy.optimizer_state
    lightning_restore_optimizer = True
    # The moving average has to be restored before it looks for one to start from.
    restore_checkpoint_after_setup = False

    def setup_environment(self) -> None:
        # Only now is it known how many there are; Lightning's "auto" would share weights inside a machine alone.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, module: Any) -> None:
        """Leave each process its part of the parameters of a TokenizerModule, unless that is done.

        Raises:
            ValueError: the VAE would be trained.
        """
        if isinstance(module, FSDPModule):
            return
        # Blocks return views, and nothing is written into those.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 takes no other; position tables are transposed.
        mesh = self.device_mesh["data_parallel"]
        # What autocast computes in bfloat16 may as well be sent so. The rest stays float32, as it does without shards.
        in_bf16 = self.precision_plugin.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if in_bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in trunk_blocks(module):
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        ignored = set(module.model.vae.parameters())
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        for name in _FORWARDS:
            register_fsdp_forward_method(module, name)
        whole = [n for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if whole:
            raise ValueError(f"{whole[0]} would be trained, but is not sharded; valid: model.vae.frozen=true")

    def check_validation(self, num_batches: Sequence[int | float]) -> None:
        """Refuse validation in which some process would wait for ever for weights that the others do not send.

        Raises:
            ValueError: the processes have not all the same number of batches.
        """
        counts = of_all_ranks(sum(num_batches))
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes have {', '.join(f'{count:g}' for count in counts)} validation batches, but with "
                "trainer=fsdp it must be one number; valid: another data.eval_batch_size, or trainer.limit_val_batches"
            )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        """Write a folder as `DurableCheckpointIO` writes a file, and with its errors; all processes call it."""
        path = Path(filepath)
        temporary = beside(path)
        with refusals_explained(path, checkpoint):
            by_rank_zero(lambda: remove(temporary))
            try:
                write_sharded(checkpoint, temporary)
                by_rank_zero(lambda: put_in_place(temporary, path))
            finally:
                if self.is_global_zero:
                    remove(temporary)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(checkpoint_path), mesh=self.device_mesh["data_parallel"])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own, stored = self.lightning_module.state_dict(), checkpoint["state_dict"]
        parts = {name: sharded_like(tensor, own[name]) if name in own else tensor for name, tensor in stored.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            of_parameters = {
                number: {name: _as_part(value, parameters[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": of_parameters})


def _as_part(value: Any, parameter: Tensor) -> Any:
    """A number of an optimizer as it is; what has the shape of its parameter, sharded like it."""
    has_shape = isinstance(value, Tensor) and value.shape == parameter.shape
    return sharded_like(value, parameter) if has_shape else value
