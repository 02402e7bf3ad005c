"""A pipeline of dictionary modules."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from flextok.model.data_dict import DataDict

logger = logging.getLogger(__name__)


class SequentialModuleDictWrapper(nn.Module):
    """Run modules one after another on one data dictionary, in the order of `module_dict`; the order is semantic."""

    def __init__(self, module_dict: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.module_dict = nn.ModuleDict(dict(module_dict))

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    def init_weights_muP(self, strict: bool = False, verbose: bool = True) -> None:
        """Call `init_weights_muP` of every module that has it; with `strict` one without it is an error."""
        for name, module in self.module_dict.items():
            if hasattr(module, "init_weights_muP"):
                module.init_weights_muP()  # type: ignore[operator]
            elif strict:
                raise ValueError(f"module {name!r} ({type(module).__name__}) has no init_weights_muP")
            elif verbose:
                logger.info("module %s has no muP initialisation", name)

    def forward(self, data_dict: DataDict) -> DataDict:
        for name, module in self.module_dict.items():
            try:
                data_dict = module(data_dict)
            except KeyError as error:
                error.add_note(f"raised in module {name!r}; keys in the dictionary: {sorted(map(str, data_dict))}")
                raise
        return data_dict
