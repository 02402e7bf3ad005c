"""Configurations, their registry, and what malformed ones are answered with: the name of the key."""

from dataclasses import dataclass, fields

import numpy as np
import pytest

import flextok.attention.sparse as sparse
from flextok.attention.sparse import (
    AdaptiveSamplingMaskerConfig,
    FixedMasker,
    FixedMaskerConfig,
    LocalMaskerConfig,
    MagicPigConfig,
    Mask,
    MaskerConfig,
    MaskerRegistry,
    OracleTopKConfig,
    OracleTopPMaskerConfig,
    RandomSamplingMaskerConfig,
    ResearchAttentionConfig,
    ResearchMasker,
    SamplingMaskerConfig,
    SinkMasker,
    SinkMaskerConfig,
    TopKMaskerConfig,
    TopPMaskerConfig,
    build_config,
)
from tests.attention.sparse.problems import hash_weights

MASKERS = {
    "AdaptiveSamplingMasker",
    "CausalMasker",
    "HashAttentionTopKMasker",
    "LocalMasker",
    "MagicPig",
    "OracleTopK",
    "OracleTopPMasker",
    "RandomSamplingMasker",
    "SinkMasker",
}
HASH = {
    "type": "HashAttentionTopKMasker",
    "heavy_size": 0.1,
    "hat_bits": 32,
    "hat_mlp_layers": 2,
    "hat_mlp_hidden_size": 8,
    "hat_mlp_activation": "silu",
    "hat_weights": hash_weights(2),
}
PIG = {"type": "MagicPig", "lsh_l": 4, "lsh_k": 4}
RANDOM = {"type": "RandomSamplingMasker", "sampling_rate": 0.1}
ADAPTIVE = {
    "type": "AdaptiveSamplingMasker",
    "base_rate_sampling": 0.1,
    "epsilon": 0.1,
    "delta": 0.1,
    "init_offset": 4,
    "local_offset": 4,
}


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(MaskerRegistry, "_registered", MaskerRegistry.get_all_registered_types())


def test_importing_the_package_registers_its_maskers():
    registered = MaskerRegistry.get_all_registered_types()
    assert {owner.__name__ for owner in registered.values()} >= MASKERS
    bases = (MaskerConfig, FixedMaskerConfig, TopKMaskerConfig, TopPMaskerConfig, SamplingMaskerConfig)
    assert not set(bases) & set(registered)
    registered.clear()
    assert MaskerRegistry.get_all_registered_types()
    for config_type in MaskerRegistry.get_all_registered_types():
        assert "search_space" in {field.name for field in fields(config_type)}


def test_every_name_of_the_catalogue_exists():
    assert all(hasattr(sparse, name) for name in sparse.__all__)
    assert sorted(sparse.__all__) == sparse.__all__


def test_maskers_come_from_their_configs():
    config = SinkMaskerConfig(4, search_space={"sink_size": [4, 8]})
    for make in (SinkMasker.create_from_config, ResearchMasker.create_masker_from_config):
        masker = make(config)
        assert type(masker) is SinkMasker
        assert masker.config is config
    with pytest.raises(ValueError, match="SinkMasker got a LocalMaskerConfig; valid: SinkMaskerConfig"):
        SinkMasker.create_from_config(LocalMaskerConfig(4))
    for unknown in (FixedMaskerConfig(), TopKMaskerConfig(3), {"sink_size": 3}):
        with pytest.raises(ValueError, match="no masker is registered for"):
            ResearchMasker.create_masker_from_config(unknown)


def test_a_config_has_one_class_and_is_matched_exactly(registered):
    @dataclass
    class OtherSinkConfig(SinkMaskerConfig):
        pass

    with pytest.raises(ValueError, match="no masker is registered for OtherSinkConfig"):
        MaskerRegistry.get_masker_class(OtherSinkConfig)

    class OtherSink(SinkMasker):
        pass

    with pytest.raises(ValueError, match="SinkMaskerConfig already belongs to SinkMasker"):
        MaskerRegistry.register(SinkMaskerConfig)(OtherSink)
    with pytest.raises(ValueError, match="cannot be registered"):
        MaskerRegistry.register(dict)
    MaskerRegistry.register(OtherSinkConfig)(OtherSink)
    assert MaskerRegistry.get_masker_class(SinkMaskerConfig) is SinkMasker
    assert isinstance(ResearchMasker.create_masker_from_config(OtherSinkConfig(3)), OtherSink)


def test_a_masker_that_only_has_a_config_is_abstract(registered):
    @MaskerRegistry.register(type("UnfinishedConfig", (FixedMaskerConfig,), {}))
    class Unfinished(FixedMasker):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Unfinished(FixedMaskerConfig())


def test_numbers_from_numpy_become_python_numbers():
    assert type(SinkMaskerConfig(np.int64(5)).sink_size) is int
    assert SinkMaskerConfig(np.float32(0.5)).sink_size == 0.5
    assert type(OracleTopKConfig(np.float64(0.25)).heavy_size) is float
    assert OracleTopPMaskerConfig(1).top_p == 1.0
    assert RandomSamplingMaskerConfig(np.float32(0.5)).sampling_rate == 0.5
    assert type(AdaptiveSamplingMaskerConfig(np.float32(0.5), 0.1, 0.1, np.int32(3), 0).init_offset) is int
    assert LocalMaskerConfig(4).mode == "trailing"
    assert LocalMaskerConfig(4).dense_when_short is True
    assert (MagicPigConfig(2, 3).packing, MagicPigConfig(2, 3).seed) == ("int64", 42)


def test_a_list_of_plain_values_becomes_configs():
    config = build_config(
        [{"type": "SinkMasker", "sink_size": 128}, HASH, ADAPTIVE | {"search_space": {"epsilon": [0.1]}}]
    )
    assert isinstance(config, ResearchAttentionConfig)
    assert config.masker_configs[0] == SinkMaskerConfig(128)
    assert config.masker_configs[2].search_space == {"epsilon": [0.1]}
    assert build_config([]).masker_configs == []


SIZES = [True, float("nan"), float("inf"), 0, -3, -0.5, "128", None, [4]]
WRONG = [
    *[("sink_size", {"type": "SinkMasker", "sink_size": size}) for size in SIZES],
    *[("window_size", {"type": "LocalMasker", "window_size": size}) for size in SIZES],
    *[("heavy_size", {"type": "OracleTopK", "heavy_size": size}) for size in SIZES],
    *[("heavy_size", HASH | {"heavy_size": size}) for size in SIZES],
    *[("top_p", {"type": "OracleTopPMasker", "top_p": p}) for p in (-0.1, 1.1, True, "0.5", float("nan"), None)],
    *[("mode", {"type": "LocalMasker", "window_size": 3, "mode": mode}) for mode in ("leading", None, 3)],
    *[("dense_when_short", {"type": "LocalMasker", "window_size": 3, "dense_when_short": x}) for x in ("no", 0)],
    *[("sampling_rate", RANDOM | {"sampling_rate": x}) for x in (0, 1.5, 2, True, "0.1", float("nan"))],
    *[(name, PIG | {name: x}) for name in ("lsh_l", "lsh_k") for x in (0, -1, 2.0, True, "4", None)],
    ("lsh_k", PIG | {"lsh_k": 65}),
    ("packing", PIG | {"packing": "int32"}),
    *[("seed", PIG | {"seed": x}) for x in (None, 1.5, "42")],
    *[("min_tables", PIG | {"min_tables": x}) for x in (0, 3, True)],
    *[(name, PIG | {name: x}) for name in ("center", "cache_keys") for x in ("yes", 1, None)],
    *[(name, ADAPTIVE | {name: x}) for name in ("epsilon", "delta") for x in (0, 1, 1.0, -0.1, True, "0.1")],
    *[("base_rate_sampling", ADAPTIVE | {"base_rate_sampling": x}) for x in (1.0, -1, -0.1, True, float("nan"))],
    *[(name, ADAPTIVE | {name: x}) for name in ("init_offset", "local_offset") for x in (1.5, -1, True, "4", None)],
    *[
        (name, HASH | {name: x})
        for name in ("hat_bits", "hat_mlp_layers", "hat_mlp_hidden_size")
        for x in (0, 1.5, "2")
    ],
    *[("hat_mlp_activation", HASH | {"hat_mlp_activation": x}) for x in ("swish", None, 3)],
    ("hat_bits", HASH | {"hat_bits": 16}),
    ("hat_mlp_layers", HASH | {"hat_mlp_layers": 3}),
    ("hat_mlp_hidden_size", HASH | {"hat_mlp_hidden_size": 16}),
    ("hat_weights", HASH | {"hat_weights": None}),
    ("hat_weights", HASH | {"hat_weights": {}}),
    ("hat_weights", HASH | {"hat_weights": {"0": hash_weights(2)[0]}}),
    ("hat_weights", HASH | {"hat_weights": {0: {"query_matrix": []}}}),
    ("hat_weight_file", HASH | {"hat_weight_file": "weights.safetensors"}),
    ("hat_weight_file", HASH | {"hat_weights": None, "hat_weight_file": 5}),
    ("search_space", {"type": "CausalMasker", "search_space": [1]}),
]


@pytest.mark.parametrize(("key", "spec"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_value_is_refused_by_the_name_of_its_key(key, spec):
    with pytest.raises(ValueError, match=key) as caught:
        build_config([{"type": "CausalMasker"}, spec])
    assert str(caught.value).startswith("masker_configs[1].")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("SinkMasker", "masker_configs="),
        ({"type": "CausalMasker"}, "masker_configs="),
        (None, "masker_configs=None"),
        (["CausalMasker"], r"masker_configs\[0\]='CausalMasker'"),
        ([{"sink_size": 4}], r"masker_configs\[0\].type=None"),
        ([{"type": "SinkMask", "sink_size": 4}], r"masker_configs\[0\].type='SinkMask'; valid: Adaptive"),
        ([{"type": ["SinkMasker"], "sink_size": 4}], r"masker_configs\[0\].type="),
        ([{"type": "TopKMasker", "heavy_size": 4}], r"masker_configs\[0\].type='TopKMasker'"),
        ([{"type": "SinkMasker", "size": 4}], r"masker_configs\[0\].size: SinkMasker has no such field"),
        ([{"type": "SinkMasker"}], r"masker_configs\[0\].sink_size: missing"),
        ([RANDOM, PIG], "masker_configs holds 2 samplers"),
        ([RANDOM, {"type": "CausalMasker"}, RANDOM], "masker_configs holds 2 samplers"),
    ],
)
def test_a_bad_list_is_refused_by_the_place_of_what_is_wrong(specs, message):
    with pytest.raises(ValueError, match=message):
        build_config(specs)


def test_a_config_of_something_else_than_maskers_is_refused():
    with pytest.raises(ValueError, match=r"masker_configs\[0\]="):
        sparse.ResearchAttention.create_from_config(ResearchAttentionConfig([{"type": "CausalMasker"}]))


def test_dimensions_for_authors_of_maskers():
    import torch

    dimensions = ResearchMasker._extract_tensor_dimensions(torch.zeros(2, 3, 7, 4), torch.zeros(2, 6, 5, 4))
    assert dimensions == (2, 6, 5, 7)
    assert (dimensions.batch_size, dimensions.num_heads) == (2, 6)
    assert (dimensions.seq_len_queries, dimensions.seq_len_keys) == (5, 7)
    assert Mask.create_empty_mask(dimensions).shape == (2, 6, 5, 7)
