"""A pipeline of dictionary modules."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from flextok.model.data_dict import DataDict
from flextok.model.utils.keys import keys_of

logger = logging.getLogger(__name__)

# A trunk that is given one of these tells equal tokens at different positions apart.
_POSITION_KEYS = ("rope_forward_read_key", "score_mod_read_key", "sa_score_mod_read_key", "xa_score_mod_read_key")


class SequentialModuleDictWrapper(nn.Module):
    """Run modules one after another on one data dictionary, in the order of `module_dict`; the order is semantic."""

    def __init__(self, module_dict: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.module_dict = nn.ModuleDict(dict(module_dict))
        modules = [vars(module) for module in self.module_dict.values()]
        if any(attributes.get(key) for attributes in modules for key in _POSITION_KEYS):
            for attributes in modules:
                if "shortens_rows" in attributes:
                    attributes["shortens_rows"] = False

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

    def split(self, varying: Iterable[str], wanted: str) -> tuple[list[str], list[str]]:
        """Which modules to run once, and which again whenever the values under the keys `varying` change.

        Modules that do not contribute to the key `wanted` are in neither list. A module is taken for a function of the
        keys that its attributes name; from one that names none on, everything runs again.
        """
        keys = {name: tuple(map(set, keys_of(vars(module)))) for name, module in self.module_dict.items()}
        needed, live = {wanted}, set()
        for name, (reads, writes) in reversed(keys.items()):
            if not reads | writes:
                live |= set(self.module_dict)
                break
            if writes & needed:
                live.add(name)
                needed = needed - writes | reads
        once, again = [], []
        changing, touched, opaque = set(varying), set(varying), False
        for name, (reads, writes) in keys.items():
            opaque = opaque or not reads | writes
            # A key that varies, or that a changing module has read or written before, must not be set ahead of it.
            if opaque or reads & changing or writes & touched:
                changing |= writes
                touched |= reads | writes
                again.append(name)
            else:
                once.append(name)
        return [name for name in once if name in live], [name for name in again if name in live]

    def written_first(self, names: Iterable[str]) -> set[str]:
        """The keys that these modules, run in their order, write before any of them reads them."""
        read, written = set[str](), set[str]()
        for name in names:
            reads, writes = map(set, keys_of(vars(self.module_dict[name])))
            read |= reads
            written |= writes - read
        return written

    def forward(self, data_dict: DataDict, only: Sequence[str] | None = None) -> DataDict:
        """Run all modules, or those whose names are in `only`, in the order of the pipeline."""
        for name, module in self.module_dict.items():
            if only is not None and name not in only:
                continue
            try:
                data_dict = module(data_dict)
            except KeyError as error:
                error.add_note(f"raised in module {name!r}; keys in the dictionary: {sorted(map(str, data_dict))}")
                raise
        return data_dict
