"""The attention an answer pays to wordings is what the model's own attention weights say."""

import pytest
import torch

from flextok.fusion import attention_mass, generate_fused, pack_segments
from tests.fusion.recorded import random_ids, recorded_model
from tests.support import max_difference


@pytest.mark.parametrize("prefix", [[], [44, 45, 46]], ids=["alone", "with prefix"])
def test_mass_is_that_of_the_attention_weights(prefix):
    model = recorded_model("eager")
    segments, separator, tail = random_ids(5, 3, 6), [7], [8, 9]
    prompt = pack_segments(segments, prefix=prefix, separator=separator, tail=tail)
    tokens = generate_fused(model, [prompt], max_new_tokens=3).token_lists()[0]
    mass = attention_mass(model, prompt, tokens)
    assert mass.shape == (2, 3, len(prompt.spans) + 2)
    assert max_difference(mass.sum(-1), torch.ones(2, 3)) < 1e-5

    # The same by transformers' eager attention under a mask written here.
    length, start = len(prompt) + 2, prompt.fusion_start
    ids = [*prompt.segment_ids.tolist(), -1, -1]
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            apart = ids[q] >= 0 and (ids[k] == ids[q] or (bool(prefix) and ids[k] == 0))
            allowed[q, k] = q == k or (apart if q < start else True)
    added = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = [*prompt.position_ids.tolist(), prompt.next_position, prompt.next_position + 1]
    with torch.no_grad():
        weights = model(
            torch.tensor([[*prompt.input_ids.tolist(), *tokens[:2]]]),
            attention_mask=added[None, None],
            position_ids=torch.tensor([positions]),
            output_attentions=True,
        ).attentions
    for layer, of_layer in enumerate(weights):
        rows = of_layer[0].mean(0)[len(prompt) - 1 :]
        groups = [rows[:, a:b].sum(-1) for a, b in prompt.spans]
        in_gaps = rows[:, [k for k in range(start) if ids[k] < 0]].sum(-1)
        expected = torch.stack([*groups, in_gaps, rows[:, start:].sum(-1)], dim=-1)
        assert max_difference(mass[layer], expected) < 1e-5


def test_a_weight_draws_attention():
    model, prompt = recorded_model(), pack_segments(random_ids(5, 3, 6), tail=[8])
    plain, weighted = (attention_mass(model, prompt, [4], weights=weights)[0, 0] for weights in (None, [1, 5, 1]))
    assert weighted[1] > plain[1]
    assert weighted[0] < plain[0]
    assert attention_mass(model, prompt, [4], weights=[0, 1, 1])[..., 0].abs().max() == 0


def test_nothing_was_generated():
    with pytest.raises(ValueError, match="tokens is empty"):
        attention_mass(recorded_model(), pack_segments(random_ids(5), tail=[8]), [])
