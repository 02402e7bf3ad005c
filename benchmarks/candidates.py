"""What is compared: the three forms of our model and the two yardsticks, behind one interface."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.observation import Observation
from benchmarks.workloads import FORMS, NOISE_KEY, Step, Workload, build_model
from benchmarks.yardsticks.batched import Batched
from benchmarks.yardsticks.plain import Plain
from flextok.attention.engine import record_backends
from flextok.flextok_wrapper import FlexTok
from flextok.model.trunks.transformers import compile_blocks
from flextok.training.objective import RectifiedFlowObjective

YARDSTICKS = {"plain": Plain, "batched": Batched}
CANDIDATES = (*FORMS, *YARDSTICKS)


class Candidate(Protocol):
    """Something that trains and decodes; `Yardstick` says what the methods do."""

    def parameters(self) -> list[Tensor]: ...
    def loss(self, step: Step) -> Tensor: ...
    def decode(
        self, quants: Tensor, keep_ks: list[int], noise: Tensor, *, num_steps: int, guidance: float
    ) -> Tensor: ...
    def compile_blocks(self) -> None: ...
    def observe(self) -> AbstractContextManager[Observation]: ...


class Ours:
    """One of our models, driven as training and evaluation drive it."""

    def __init__(self, model: FlexTok) -> None:
        self.model = model
        self.objective = RectifiedFlowObjective()
        self.trunks = {
            "encoder": model.encoder.module_dict["enc_transformer"],
            "decoder": model.decoder.module_dict["dec_transformer"],
        }

    def parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loss(self, step: Step) -> Tensor:
        return self.objective(self.model, step.data(self.model))["total"]

    def decode(self, quants: Tensor, keep_ks: list[int], noise: Tensor, *, num_steps: int, guidance: float) -> Tensor:
        data = {
            self.model.quants_write_key: list(quants.split(1)),
            self.model.eval_keep_k_key: keep_ks,
            NOISE_KEY: list(noise.split(1)),
        }
        data = self.model.pipeline(data, timesteps=num_steps, guidance_scale=guidance, verbose=False)
        return torch.cat(list(data[self.model.pipeline.reconst_write_key]))

    def compile_blocks(self) -> None:
        compile_blocks(self.model)

    @contextmanager
    def observe(self) -> Iterator[Observation]:
        """Yield what is noted about the forwards inside; not for compiled blocks, which the hooks would recompile."""
        observation = Observation()
        sums = {name: [0] * len(trunk.blocks) for name, trunk in self.trunks.items()}
        handles = [
            block.register_forward_pre_hook(partial(_note_tokens, sums[name], index), with_kwargs=True)
            for name, trunk in self.trunks.items()
            for index, block in enumerate(trunk.blocks)
        ]
        try:
            with record_backends() as names:
                yield observation
        finally:
            for handle in handles:
                handle.remove()
        for name, per_block in sums.items():
            if len(set(per_block)) != 1:
                raise RuntimeError(f"the blocks of the {name} processed different numbers of tokens: {per_block}")
            observation.tokens[name] = per_block[0]
        if not names:
            raise RuntimeError("no attention backend was recorded: the engine was bypassed")
        observation.backends.update(names)


def _note_tokens(sums: list[int], index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs["x"]
    sums[index] += x.shape[0] * x.shape[1]


def build_candidate(name: str, workload: Workload, device: torch.device, *, training: bool) -> Candidate:
    """A candidate with the weights that all candidates of a workload share."""
    if name in YARDSTICKS:
        return YARDSTICKS[name](build_model(workload, "mask_token", device))
    form = next(form for form in FORMS if form == name)
    # What is decoded in the mask-token form are released checkpoints.
    exported = form == "mask_token" and not training
    return Ours(build_model(workload, form, device, exported=exported).train(training))


def precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 autocast on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
