"""Which masker class a configuration stands for. Importing `flextok.attention.sparse` registers all of the package."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from flextok.attention.sparse.config import MaskerConfig

if TYPE_CHECKING:
    from flextok.attention.sparse.masker import ResearchMasker

M = TypeVar("M", bound="type[ResearchMasker]")


class MaskerRegistry:
    """Configuration types and their maskers."""

    _registered: "dict[type[MaskerConfig], type[ResearchMasker]]" = {}

    @classmethod
    def register(cls, config_type: Any) -> Callable[[M], M]:
        """Decorate a masker class: configurations of exactly `config_type` make it.

        Raises:
            ValueError: `config_type` is no `MaskerConfig`, or another class has it.
        """
        if not (isinstance(config_type, type) and issubclass(config_type, MaskerConfig)):
            raise ValueError(f"{config_type!r} cannot be registered; valid: a subclass of MaskerConfig")

        def remember(masker_class: M) -> M:
            holder = cls._registered.get(config_type)
            if holder is not None and holder is not masker_class:
                raise ValueError(f"{config_type.__name__} already belongs to {holder.__name__}")
            cls._registered[config_type] = masker_class
            return masker_class

        return remember

    @classmethod
    def get_masker_class(cls, config_type: Any) -> "type[ResearchMasker]":
        """The class registered for exactly this type; ValueError if there is none."""
        if config_type not in cls._registered:
            known = ", ".join(sorted(known.__name__ for known in cls._registered))
            raise ValueError(
                f"no masker is registered for {getattr(config_type, '__name__', config_type)}; known: {known}"
            )
        return cls._registered[config_type]

    @classmethod
    def get_all_registered_types(cls) -> "dict[type[MaskerConfig], type[ResearchMasker]]":
        """A copy: configuration types and their classes."""
        return dict(cls._registered)
