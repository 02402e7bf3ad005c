"""A model called again and again on the same conditions: what does not change from call to call is computed once."""

from typing import Any

from flextok.attention.layout import SequenceLayout
from flextok.model.data_dict import DataDict
from flextok.model.packed_shapes import PackedShapes
from flextok.model.utils.wrappers import SequentialModuleDictWrapper


class RepeatedModel:
    """`model` on fixed inputs, as a function of the values under the keys `varying`.

    Modules that depend on none of these run once, those that do not matter for `wanted` not at all, and layouts are
    handed on from call to call, with the masks and index tensors made of them. A model that is no pipeline of modules,
    or that is in training mode (it draws), is simply called.
    """

    def __init__(self, model: Any, inputs: DataDict, *, varying: tuple[str, ...], wanted: str) -> None:
        self._model = model
        self._arguments: tuple[Any, ...] = ()
        self._inputs = inputs
        if isinstance(model, SequentialModuleDictWrapper) and not model.training:
            once, again = model.split(varying, wanted)
            # Called, not looked into: wrappers around the module's call stay in force.
            self._inputs = model(dict(inputs), once)
            for key in model.written_first(again):
                if isinstance(self._inputs.get(key), SequenceLayout | PackedShapes):
                    del self._inputs[key]  # Of an earlier use of the dictionary; it would hide the new one.
            self._arguments = (again,)

    def __call__(self, values: DataDict) -> DataDict:
        """The dictionary after the model has run; the inputs stay as they are."""
        data = self._model({**self._inputs, **values}, *self._arguments)
        layouts = {key: value for key, value in data.items() if isinstance(value, SequenceLayout | PackedShapes)}
        self._inputs = {**layouts, **self._inputs}
        return data
