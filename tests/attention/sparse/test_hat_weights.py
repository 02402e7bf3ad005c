"""Weight files of HashAttention: written, read, converted, and refused when they are something else."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from flextok.attention.sparse import (
    HashAttentionTopKMaskerConfig,
    ResearchMasker,
    convert_hat_checkpoint,
    load_hat_weights,
    save_hat_weights,
)
from tests.attention.sparse.problems import hash_weights

OPTIONS = {"heavy_size": 3, "hat_bits": 32, "hat_mlp_layers": 2, "hat_mlp_hidden_size": 8, "hat_mlp_activation": "silu"}


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for layer in first:
        assert first[layer].keys() == second[layer].keys()
        for part in first[layer]:
            assert len(first[layer][part]) == len(second[layer][part])
            assert all(map(torch.equal, first[layer][part], second[layer][part]))


def masker_of(path, **options):
    return ResearchMasker.create_masker_from_config(
        HashAttentionTopKMaskerConfig(**(OPTIONS | options), hat_weight_file=path)
    )


def test_weights_survive_a_file(tmp_path):
    weights = hash_weights(3, layers=(0, 2, 11))
    save_hat_weights(weights, tmp_path / "a.safetensors")
    assert_equal_weights(load_hat_weights(tmp_path / "a.safetensors"), weights)
    masker = masker_of(tmp_path / "a.safetensors")
    q, k = torch.randn(1, 3, 1, 8), torch.randn(1, 1, 9, 8)
    given = HashAttentionTopKMaskerConfig(**OPTIONS, hat_weights=weights)
    expected = ResearchMasker.create_masker_from_config(given).scores(q, k, None, 1.0, {}, layer_idx=11)
    assert torch.equal(masker.scores(q, k, None, 1.0, {}, layer_idx=11), expected)


def checkpoint_of(weights):
    """Names and layout of a training checkpoint: one module per head, weights `(d_out, d_in)`."""
    states = {}
    for layer, parts in weights.items():
        for side in ("query", "key"):
            pairs = zip(parts[f"{side}_matrix"], parts[f"{side}_bias"], strict=True)
            for i, (matrix, bias) in enumerate(pairs):
                for head in range(len(matrix)):
                    name = f"{layer}.learning_to_hash_transformation_{side[0]}.{head}.{2 * i}"
                    states |= {f"{name}.weight": matrix[head].T.clone(), f"{name}.bias": bias[head].clone()}
    return states


@pytest.mark.parametrize("form", ["states", "nested", "memory"])
def test_checkpoints_are_converted(tmp_path, form):
    weights = hash_weights(3, layers=(0, 5))
    content = {"states": checkpoint_of(weights), "nested": {"state_dict": checkpoint_of(weights)}, "memory": weights}
    torch.save(content[form], tmp_path / "a.pt")
    convert_hat_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert_equal_weights(load_hat_weights(tmp_path / "a.safetensors"), weights)


def test_a_bias_that_a_checkpoint_lacks_is_zero(tmp_path):
    weights = hash_weights(2)
    states = {name: x for name, x in checkpoint_of(weights).items() if not name.endswith("_q.1.2.bias")}
    torch.save(states, tmp_path / "a.pt")
    convert_hat_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors")
    biases = load_hat_weights(tmp_path / "a.safetensors")[0]["query_bias"][1]
    assert not biases[1].any()
    assert torch.equal(biases[0], weights[0]["query_bias"][1][0])


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_no_file_is_unpickled(tmp_path, save):
    with (tmp_path / "a.pt").open("wb") as file:
        save({0: Harmful(tmp_path / "harm")}, file)
    with pytest.raises(ValueError, match=r"hat_weight_file=.*convert_hat_checkpoint"):
        masker_of(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="checkpoint="):
        convert_hat_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert not (tmp_path / "harm").exists()


def saved(change):
    """A file of weights after `change` of its tensors."""

    def write(path):
        save_hat_weights(hash_weights(2), path)
        from safetensors.torch import load_file

        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return write


def cut(path):
    save_hat_weights(hash_weights(2), path)
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "missing": (lambda path: None, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "cut": (cut, "cannot be read"),
    "other names": (saved(lambda x: x.update(weight=torch.zeros(1))), "holds 'weight'"),
    "a gap": (saved(lambda x: (x.pop("0.query_matrix.0"), x.pop("0.query_bias.0"))), "lacks some of 0.query"),
    "no bias": (saved(lambda x: x.pop("0.key_bias.1")), "2 key_matrix, 1 key_bias"),
    "no keys": (saved(lambda x: [x.pop(name) for name in list(x) if "key_" in name]), "holds"),
    "no tensors": (lambda path: save_file({}, path), "layers, one or more"),
    "a wrong width": (saved(lambda x: x.update({"0.key_matrix.1": torch.zeros(2, 9, 32)})), "key_matrix.1 has shape"),
    "a wrong bias": (saved(lambda x: x.update({"0.key_bias.1": torch.zeros(2, 31)})), "key_bias.1"),
    "not finite": (saved(lambda x: x["0.query_bias.0"].fill_(torch.nan)), "query_bias.0 is not a tensor of finite"),
    "integers": (saved(lambda x: x.update({"0.query_bias.0": torch.zeros(2, 8).int()})), "query_bias.0 is not"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name, tmp_path):
    write, message = BROKEN[name]
    write(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"hat_weight_file.*{message}"):
        masker_of(tmp_path / "a.safetensors")


@pytest.mark.parametrize("option", ["hat_bits", "hat_mlp_layers", "hat_mlp_hidden_size"])
def test_options_have_to_fit_the_file(option, tmp_path):
    save_hat_weights(hash_weights(2), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"{option}=5, but hat_weight_file\[0\]"):
        masker_of(tmp_path / "a.safetensors", **{option: 5})


@pytest.mark.parametrize(
    ("shape", "layer", "message"),
    [((3, 8), 0, "made for 2 heads of 8"), ((2, 4), 0, "of 8, not"), ((2, 8), 1, "layer_idx=1")],
)
def test_weights_have_to_fit_the_model(shape, layer, message):
    config = HashAttentionTopKMaskerConfig(**OPTIONS, hat_weights=hash_weights(2))
    q, k = (torch.zeros(1, shape[0], 9, shape[1]) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        ResearchMasker.create_masker_from_config(config).scores(q, k, None, 1.0, {}, layer_idx=layer)


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": torch.zeros(2)}, {}, {"0.learning_to_hash_transformation_q.0.1.bias": torch.zeros(2)}]
)
def test_checkpoints_of_something_else_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="checkpoint"):
        convert_hat_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("lost", [".1.0.weight", "_k.0.2.weight"])
def test_checkpoints_that_lack_a_head_or_a_layer_are_refused(lost, tmp_path):
    states = {name: x for name, x in checkpoint_of(hash_weights(3)).items() if lost not in name}
    torch.save(states, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="checkpoint: heads"):
        convert_hat_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors")
