"""Hash projections: targets, that they learn, that a kill changes nothing, and that watching changes no result."""

import json
from dataclasses import replace

import pytest
import torch

from flextok.attention.layout import layout_of
from flextok.attention.sparse import build_config, load_hat_weights
from flextok.model.trunks.transformers import FlexTransformer
from flextok.sparse_lm import sparse_attention
from flextok.training import hash_training
from flextok.training.hash_data import LayerQueries, observe_language_model, observed_trunk
from flextok.training.hash_module import HashModule, best_keys
from flextok.training.hash_recall import draw_recall, format_recall, random_projections, recall
from flextok.training.hash_settings import HashSettings
from flextok.training.hash_training import train_hash
from tests.sparse_lm.models import FAMILIES, model_of, random_ids

CPU = torch.device("cpu")
SETTINGS = HashSettings(steps=60, batch_size=4, hidden=16, target=0.1, lr=1e-2)


def toy(num_sequences=8, heads=2, kv_heads=1, tokens=40, width=8, causal=False):
    """What matters is in two of eight directions of keys, and in two others of queries."""
    generator = torch.Generator().manual_seed(0)
    observed = LayerQueries()
    for _ in range(num_sequences):
        signal = torch.randn(heads, tokens, 2, generator=generator)
        q = torch.cat([signal * 3, torch.randn(heads, tokens, width - 2, generator=generator) * 0.1], -1)
        k = torch.randn(kv_heads, tokens, width, generator=generator)
        k[..., 2:] *= 4
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else None
        observed.add(q, k, allowed)
    return {0: observed}


def train(observed, folder, settings=SETTINGS, **options):
    given = {"bits": [16], "densities": [0.1, 0.3], "device": CPU, "save_every": 20, "progress": False, **options}
    return train_hash(observed, folder, settings, **given)


def test_the_best_keys_are_those_of_the_largest_allowed_logits():
    observed = toy(1, causal=True)[0]
    is_best, is_pair = best_keys(observed, 0, 0.1)
    logits = observed.queries[0] @ observed.keys[0].mT
    assert not is_best[:, :4].any()
    for query in (4, 20, 39):
        expected = logits[1, query, : query + 1].topk(4).indices
        assert set(is_best[1, query].nonzero()[:, 0].tolist()) == set(expected.tolist())
        assert is_pair[0, query].sum() == query + 1


def test_what_is_learned_beats_random_projections(tmp_path):
    report = train(toy(causal=True), tmp_path / "hash")
    for row in report["results"]:
        assert row["learned"] > row["random"] + 0.05
        assert row["learned"] > row["density"] + 0.2
    assert report["protocol"]["sequences"] == 6
    assert report["protocol"]["held_out"] == 2
    files = {path.name for path in (tmp_path / "hash").iterdir()}
    assert files == {"hash_16.safetensors", "recall.json", "recall.png", "training.json"}
    assert json.loads((tmp_path / "hash" / "recall.json").read_text())["results"][0]["bits"] == 16
    assert "16     0.10" in format_recall(report)
    assert len(draw_recall(report).axes) == 1


def test_more_bits_find_more_and_all_bits_of_a_key_find_itself():
    observed = toy(2)
    few, many = (recall(observed, random_projections(observed, bits, 0), 0.1)[0] for bits in (4, 256))
    assert few < many
    same = LayerQueries()
    for keys in observed[0].queries:
        unit = torch.nn.functional.normalize(keys, dim=-1)
        same.add(unit, unit, None)
    assert recall({0: same}, random_projections({0: same}, 256, 0), 1 / 40) == {0: 1.0}


def test_the_loss_weighs_best_keys_and_others_alike():
    module = HashModule(toy(), 8, SETTINGS)
    with torch.no_grad():
        for name, parameter in module.perceptrons.items():
            parameter.zero_() if "matrix" in name else None
        # A logit of 0 everywhere: log 2, whatever the share of best keys.
        assert float(module.loss_of(0, 0)) == pytest.approx(0.6931, abs=1e-3)


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    observed = toy()
    train(observed, tmp_path / "whole")
    original = HashModule.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 47:
            raise RuntimeError("killed")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(HashModule, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(observed, tmp_path / "parts")
    assert (tmp_path / "parts" / "hash_16" / "last.ckpt").exists()
    train(observed, tmp_path / "parts")
    whole, parts = (load_hat_weights(tmp_path / name / "hash_16.safetensors")[0] for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for name in whole for a, b in zip(whole[name], parts[name], strict=True))


def test_a_finished_training_is_not_done_again(tmp_path, monkeypatch):
    first = train(toy(), tmp_path, replace(SETTINGS, steps=2))
    monkeypatch.setattr(hash_training, "_fit", None)
    assert train(toy(), tmp_path, replace(SETTINGS, steps=2)) == first
    with pytest.raises(ValueError, match="holds a training with another steps, data_sha256; valid: another folder"):
        train(toy(4), tmp_path, replace(SETTINGS, steps=3))


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 sequences; valid: 2 or more"):
        train(toy(1), tmp_path)
    with pytest.raises(ValueError, match="bits=0: it must be at least 1"):
        train(toy(2), tmp_path, bits=[0])
    with pytest.raises(ValueError, match=r"density=1\.0: it must be above 0 and below 1"):
        train(toy(2), tmp_path, densities=[1.0])
    (tmp_path / "other").write_text("")
    with pytest.raises(ValueError, match="holds files, but no training.json"):
        train(toy(2), tmp_path)
    for wrong in ({"steps": 0}, {"target": 1.0}, {"lr": float("nan")}, {"activation": "sign"}, {"mlp_layers": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            replace(SETTINGS, **wrong)


@torch.no_grad()
def test_queries_and_keys_of_a_language_model_are_its_own():
    model, ids = model_of(FAMILIES["llama"]), random_ids(50)
    before = model(ids[None, :12]).logits
    observed = observe_language_model(model, ids, context=12, windows=3)
    assert torch.equal(model(ids[None, :12]).logits, before)
    assert sorted(observed) == [0, 1]
    assert [tuple(q.shape) for q in observed[1].queries] == [(6, 12, 8)] * 3
    assert [tuple(k.shape) for k in observed[1].keys] == [(2, 12, 8)] * 3
    with sparse_attention(model, build_config([])):
        cache = model(ids[None, :12], use_cache=True).past_key_values
    assert torch.allclose(cache.layers[1].keys[0], observed[1].keys[0], atol=1e-5)
    with pytest.raises(ValueError, match="50 tokens are 1 windows of 40; valid: 2 windows or more"):
        observe_language_model(model, ids, context=40, windows=3)


@torch.no_grad()
def test_queries_and_keys_of_a_trunk_are_its_own():
    """What is observed gives, by plain attention, what the first layer computed; results do not change."""
    trunk = FlexTransformer("x", "y", block_mask_read_key="mask", dim=16, depth=2, head_dim=8)
    x = random_ids(1, 10, 16).float() / 64 - 1
    for mode, allowed in (("full", None), ("causal", torch.ones(10, 10, dtype=torch.bool).tril())):
        data = {"x": x, "mask": layout_of([[4, 6]], mode=mode)}
        before = trunk(dict(data))["y"]
        with observed_trunk(trunk) as observed:
            assert torch.equal(trunk(dict(data))["y"], before)
        assert sorted(observed) == [0, 1]
        assert observed[0].queries[0].shape == observed[1].keys[0].shape == (2, 10, 8)
        found = observed[1].allowed[0]
        assert found is None if allowed is None else torch.equal(found, allowed)
        attention, norm = trunk.blocks[0].attn, trunk.blocks[0].norm1
        logits = (observed[0].queries[0] @ observed[0].keys[0].mT) * attention.scale
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        values = attention.wv(norm(x)).unflatten(-1, (2, 8)).transpose(1, 2)[0]
        expected = attention.proj((logits.softmax(-1) @ values).transpose(0, 1).flatten(1))
        assert torch.allclose(attention(norm(x), None, data["mask"])[0], expected, atol=1e-5)
        trunk(dict(data))
        assert len(observed[0].queries) == 1
    with observed_trunk(trunk), pytest.raises(ValueError, match="rows of one image each"):
        trunk({"x": x, "mask": layout_of([[4], [6]])})
