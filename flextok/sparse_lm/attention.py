"""`sparse_attention`: a causal LM of transformers under a list of maskers, in plain calls and in `generate`.

with sparse_attention(model, build_config([{"type": "SinkMasker", "sink_size": 4}, ...])) as state:
    model.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=20)
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from flextok.attention.sparse import ResearchAttentionConfig
from flextok.sparse_lm.handler import handled_attention
from flextok.sparse_lm.state import SparseState


@contextmanager
def sparse_attention(
    model: PreTrainedModel,
    config: ResearchAttentionConfig,
    *,
    dense_prefill: bool = False,
    seed: int = 0,
    measure: bool = False,
    gather: bool = True,
) -> Iterator[SparseState]:
    """Let `model` attend to what the maskers choose; afterwards, and after an error, it attends as before.

    A call with several new tokens is a prefill: lists of sink, local and causal maskers compute nothing but what they
    choose, others all scores. A call with one is a step of decoding: it gathers the chosen keys where each masker has
    a `select`, to the same result. Each row of a batch has a state of its own, or the dictionaries that the call of the
    model is given as `sparse_meta_data`. Columns of padding on the left are no keys: sizes count a row's own tokens.

    The choice is part of the model, so another thread must not run it meanwhile.

    Args:
        dense_prefill: only steps of decoding are sparse.
        seed: what samplers draw follows from it, alike for each sequence.
        measure: count pairs for `state.density`, which makes devices wait.
        gather: False decodes from all scores too, as a check.

    Raises:
        ValueError: a model whose attention cannot be chosen or has windows; later, in calls of the model, batches
            padded on the right, static caches, dropout.
        TypeError: `config` is of another type.
    """
    state = SparseState(config, dense_prefill=dense_prefill, seed=seed, measure=measure, gather=gather)
    with handled_attention(model, state):
        yield state
