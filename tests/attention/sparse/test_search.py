"""Density and error of lists of maskers, and the search for the best of both."""

from types import SimpleNamespace

import pytest
import torch

from flextok.attention.sparse import build_config
from flextok.attention.sparse.search import AttentionCall, cost_of, search


def calls(num_keys=200):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 2, 16), (1, 2, num_keys, 16), (1, 2, num_keys, 16))
    return [AttentionCall(*(2 * torch.randn(shape, generator=generator) for shape in shapes), 0.25) for _ in range(2)]


def top_k(size, **options):
    return build_config([{"type": "OracleTopK", "heavy_size": size} | options])


def test_more_keys_are_denser_and_nearer_to_dense_attention():
    costs = [cost_of(top_k(size), calls(), seed=0) for size in (5, 20, 100, 200)]
    assert [cost.density for cost in costs] == [pytest.approx(size / 200) for size in (5, 20, 100, 200)]
    errors = [cost.error for cost in costs]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert cost_of(build_config([]), calls(), seed=0) == (1, 0)


@pytest.mark.parametrize(
    "space", [[5, 20, 100], (5, 20, 100), {"grid_search": [5, 20, 100]}, SimpleNamespace(categories=[5, 20, 100])]
)
def test_a_search_finds_the_trades_there_are(space):
    study = search(top_k(1, search_space={"heavy_size": space}), calls(), num_trials=12, seed=0)
    tried = {trial.params["0.heavy_size"] for trial in study.trials}
    assert tried <= {5, 20, 100}
    assert {trial.params["0.heavy_size"] for trial in study.best_trials} == tried


def test_a_search_of_density_and_error_of_vattention():
    spaces = {"epsilon": [0.05, 0.5], "delta": [0.05, 0.5]}
    around = [{"type": "SinkMasker", "sink_size": 4}, {"type": "LocalMasker", "window_size": 4}]
    adaptive = {"base_rate_sampling": 0.05, "epsilon": 0.1, "delta": 0.1, "init_offset": 4, "local_offset": 4}
    spec = {"type": "AdaptiveSamplingMasker", "search_space": spaces} | adaptive
    study = search(build_config([*around, spec]), calls(400), num_trials=8, seed=0)
    by_epsilon = {trial.params["2.epsilon"]: trial.values[0] for trial in study.trials}
    assert by_epsilon[0.05] > by_epsilon[0.5]


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (top_k(3), 1, "search_space: no masker has one"),
        (top_k(3, search_space={"heavy_size": 5}), 1, r"masker_configs\[0\].search_space\['heavy_size'\]=5"),
        (top_k(3, search_space={"heavy_size": []}), 1, r"masker_configs\[0\].search_space\['heavy_size'\]"),
        (top_k(3, search_space={"heavy_size": [0]}), 1, "heavy_size=0"),
        (top_k(3, search_space={"heavy_size": [5]}), 0, "calls is empty"),
    ],
)
def test_what_cannot_be_searched_is_refused(config, given, message):
    with pytest.raises(ValueError, match=message):
        search(config, calls()[:given], num_trials=1, seed=0)
