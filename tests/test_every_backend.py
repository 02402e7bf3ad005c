"""Recorded outputs and the proofs of nested dropout hold whichever backend answers attention."""

from functools import lru_cache, partial

import pytest
import torch

from flextok.attention.engine import record_backends
from flextok.model.trunks.transformers import set_attention_backend
from tests.model import test_dropout_proofs as proofs
from tests.support import recorded_cases, recorded_inputs, recorded_model, recorded_tensors
from tests.test_recorded_outputs import MODEL_OPS, compare

# Those of `auto` are what the other tests use.
OTHERS = ["sdpa", "reference", "flex"]
# No attention, or a model of its own, which computes what another case computes.
WITHOUT_A_CHOICE = ("state_dict", "vae_encode", "vae_decode", "hub")

every_backend = pytest.mark.parametrize("backend", OTHERS)


# --- recorded models --------------------------------------------------------------------------------------------------

CASES = [
    pytest.param(stem, case, id=f"{stem.removesuffix('_cases')}-{case['name']}")
    for stem in ("flextok_cases", "attn_masked_cases")
    for case in recorded_cases(stem)
    if case["kind"] == "model" and case["op"] not in WITHOUT_A_CHOICE
]


@pytest.fixture
def recorded_models_with(recorded_folder):
    """A function that sets the backend of the shared models; undone afterwards."""
    models = [recorded_model(checkpoint) for checkpoint in {param.values[1]["ckpt"] for param in CASES}]

    def choose(backend):
        for model in models:
            set_attention_backend(model, backend)

    yield choose
    choose("auto")


@every_backend
@pytest.mark.parametrize(("stem", "case"), CASES)
def test_recorded_output_of_a_model(backend, stem, case, recorded_models_with, monkeypatch):
    recorded_models_with(backend)
    inputs = recorded_inputs(stem, case)
    if backend == "flex" and case["op"] == "train_grad":
        with pytest.raises(ValueError, match="no backward on the CPU"):
            MODEL_OPS[case["op"]](case, inputs, monkeypatch)
        return
    with record_backends() as backends:
        results = MODEL_OPS[case["op"]](case, inputs, monkeypatch)
    assert set(backends) == {backend}
    compare(results, recorded_tensors(stem, case["name"], "out"), case)


# --- proofs -----------------------------------------------------------------------------------------------------------

SIZES = [proofs.EQUAL[:3], proofs.MIXED]
KEEP_KS = [proofs.KEEP_KS[name] for name in ("one", "different")]

every_layout = pytest.mark.parametrize("mask_mode", proofs.MODES)
every_batch = pytest.mark.parametrize("sizes", SIZES, ids=["3equal", "4mixed"])


@lru_cache
def decoder_with(backend, **options):
    decoder = proofs.tiny_decoder(**options)
    set_attention_backend(decoder, backend)
    return decoder


@pytest.fixture(params=OTHERS)
def backend(request, monkeypatch):
    monkeypatch.setattr(proofs, "decoder_for", partial(decoder_with, request.param))
    with record_backends() as names:
        yield request.param
    assert set(names) == {request.param}


@every_layout
@proofs.every_packer
@every_batch
@pytest.mark.parametrize("keep_ks", KEEP_KS, ids=["one", "different"])
def test_dropped_registers_do_not_exist(backend, mask_mode, drop_masked, sizes, keep_ks):
    arguments = (mask_mode, drop_masked, sizes, keep_ks)
    proofs.test_values_of_dropped_registers_have_no_influence_at_all(*arguments)
    proofs.test_hiding_registers_equals_cutting_them_off(*arguments)


@every_layout
@proofs.every_packer
@every_batch
def test_dropped_registers_receive_no_gradient(backend, mask_mode, drop_masked, sizes):
    arguments = (mask_mode, drop_masked, sizes, proofs.KEEP_KS["different"])
    if backend == "flex":
        with pytest.raises(ValueError, match="no backward on the CPU"):
            proofs.test_dropped_registers_receive_exactly_no_gradient(*arguments)
        with torch.no_grad():
            proofs.decode(proofs.decoder_for(), proofs.inputs_for(sizes), proofs.KEEP_KS["different"])
        return
    proofs.test_dropped_registers_receive_exactly_no_gradient(*arguments)


@proofs.every_packer
def test_keep_k_that_is_absent_stale_or_too_large(backend, drop_masked):
    proofs.test_without_keep_k_all_are_kept_and_a_stale_value_is_not_used(drop_masked, SIZES[0])
    proofs.test_a_dictionary_used_twice_gives_what_its_second_call_asks_for(drop_masked)
    proofs.test_more_than_there_are_means_all(drop_masked, proofs.NUM_REGISTERS + 1)


@proofs.every_packer
def test_null_condition(backend, drop_masked):
    proofs.test_null_condition_holds_per_sample_and_leaves_the_mask_alone(drop_masked, SIZES[0])


def test_the_number_of_kept_registers_matters(backend):
    proofs.test_the_number_of_kept_registers_matters()
