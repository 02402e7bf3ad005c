"""What a small language model is made of and how it is trained. Light: `--help` reads it."""

from dataclasses import dataclass

from flextok.training.setting_option import setting_option

FAMILIES = ("llama", "qwen2", "mistral")
PRECISIONS = ("fp32", "bf16")
WEIGHTS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings:
    """Sizes and training; each is an option of `flextok train-lm` with underscores as dashes.

    Raises:
        ValueError: A value is out of range, or the sizes do not fit together.
    """

    family: str = setting_option("llama", "the kind of transformer", FAMILIES)
    layers: int = setting_option(3, "transformer blocks")
    width: int = setting_option(128, "of the residual stream")
    heads: int = setting_option(4, "attention heads; width / heads is even, for rotary positions")
    kv_heads: int = setting_option(2, "heads of keys and values, each for a group of heads")
    vocab_size: int = setting_option(
        1024, "tokens of the byte-level BPE, at most; at least 259: the bytes, BOS, EOS and PAD"
    )
    context: int = setting_option(256, "tokens the model reads at most; longer texts are cut into pieces")
    steps: int = setting_option(1000, "steps of the optimizer")
    batch_size: int = setting_option(64, "examples in a step")
    lr: float = setting_option(
        3e-3, "peak learning rate; warms up over the first 5 %% of steps, then falls as a cosine to 0"
    )
    weight_decay: float = setting_option(0.1, "of the matrices, as AdamW has it")
    seed: int = setting_option(0, "of the weights and of the order of the examples")
    precision: str = setting_option("fp32", "bf16 trains with autocast; slower on most CPUs", PRECISIONS)
    weights: str = setting_option("fp32", "number format in the file; the model is loaded as fp32 anyway", WEIGHTS)
    wordings: int = setting_option(
        1, "JSON lines: half of the steps show 2 to so many wordings of a question side by side"
    )
    word_dropout: float = setting_option(
        0.0, "JSON lines: share of the tokens left out of wordings that stand side by side"
    )

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "context", "steps", "batch_size", "wordings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width={self.width}: it must be heads={self.heads} times an even number")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads}: it must divide heads={self.heads}")
        if self.vocab_size < 259:
            raise ValueError(f"vocab_size={self.vocab_size}: it must be at least 259: 256 bytes, BOS, EOS and PAD")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr}: it must be above 0")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay}: it must be at least 0")
        if not 0 <= self.word_dropout < 1:
            raise ValueError(f"word_dropout={self.word_dropout}: it must be at least 0 and below 1")
        for name, valid in (("family", FAMILIES), ("precision", PRECISIONS), ("weights", WEIGHTS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r}: valid are {', '.join(valid)}")
