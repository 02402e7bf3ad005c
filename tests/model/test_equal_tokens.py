"""Equal tokens computed once, and dropped tokens not at all, change no number."""

from functools import lru_cache

import pytest
import torch
from hydra.errors import InstantiationException
from hypothesis import given
from hypothesis import strategies as st

from flextok.attention.layout import SequenceLayout
from flextok.model.packed_list import PackedList
from flextok.model.postprocessors.seq_unpacking import SequenceUnpacker
from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker
from flextok.model.repeated_tail import RepeatedTail, replace_tails
from flextok.model.trunks.transformers import FlexTransformer, FlexTransformerDecoder, set_attention_backend
from flextok.model.utils.wrappers import SequentialModuleDictWrapper
from tests.support import FORMS, max_difference, randomize, small_tokenizer

WIDTH, REGISTERS = 3, 16

# --- the list that ends in equal tokens -------------------------------------------------------------------------------


@st.composite
def token_lists(draw):
    """Lengths of a batch of token lists, zeros among them; half of the batches are uniform."""
    batch = draw(st.integers(1, 5))
    lengths = draw(st.tuples(*[st.integers(0, 6)] * batch))
    return [lengths[0]] * batch if draw(st.booleans()) else list(lengths)


def entries_of(lengths):
    return PackedList.pack([torch.randn(1, length, WIDTH) for length in lengths])


def replaced_by_hand(entries, keep, fill):
    return [
        torch.cat([entry[:, :k], fill.expand(1, max(0, entry.shape[1] - k), -1)], dim=1)
        for entry, k in zip(entries, keep, strict=True)
    ]


def assert_is_the_list(tail, expected):
    """Every way to read it gives what the list has."""
    assert len(tail) == len(expected)
    assert tail.shapes == tuple(tuple(entry.shape) for entry in expected)
    assert tail.num_tokens == tuple(entry.shape[1] for entry in expected)
    assert tail.is_uniform == (len(set(tail.shapes)) == 1)
    whole = PackedList.pack(expected)
    assert tail.tensor.shape == whole.tensor.shape
    assert torch.equal(tail.tensor, whole.tensor)
    for i, (entry, given_entry) in enumerate(zip(tail, expected, strict=True)):
        assert torch.equal(entry, given_entry)
        assert torch.equal(tail[i], given_entry)
    assert torch.equal(tail[-1], expected[-1])
    for entry, given_entry in zip(tail[1:], expected[1:], strict=True):
        assert torch.equal(entry, given_entry)
    for entry, given_entry in zip(tail.map(lambda x: 2 * x), expected, strict=True):
        assert torch.equal(entry, 2 * given_entry)
    prefixes = [max(0, entry.shape[1] - 1) for entry in expected]
    for entry, given_entry, n in zip(tail.prefixes(prefixes), expected, prefixes, strict=True):
        assert torch.equal(entry, given_entry[:, :n])
    rows = torch.randn(len(expected), WIDTH)
    with_rows = PackedList(tail.tensor + tail.repeat_rows(rows), None if tail.is_uniform else tail.shapes)
    for entry, given_entry, row in zip(with_rows, expected, rows, strict=True):
        assert torch.equal(entry, given_entry + row)
    assert PackedList.pack(tail) is tail


@given(token_lists(), st.lists(st.tuples(*[st.integers(0, 8)] * 5), min_size=1, max_size=3))
def test_replacing_tails_again_and_again_equals_replacing_them_by_hand(lengths, keeps):
    """Also where a later cut goes through the equal tokens of an earlier one, or lies behind them."""
    tail, fills = entries_of(lengths), torch.randn(len(keeps), WIDTH)
    expected = list(tail)
    for keep, fill in zip(keeps, fills, strict=True):
        expected = replaced_by_hand(expected, keep[: len(lengths)], fill)
        tail = replace_tails(tail, keep[: len(lengths)], fill)
    assert_is_the_list(tail, expected)


@given(token_lists(), st.data())
def test_a_repeated_tail_is_the_list_it_stands_for(lengths, data):
    counts = [data.draw(st.integers(1, 6)) if length else 1 for length in lengths]
    stored = entries_of(lengths)
    expected = [
        torch.cat([entry, entry[:, -1:].expand(-1, count - 1, -1)], dim=1)
        for entry, count in zip(stored, counts, strict=True)
    ]
    assert_is_the_list(RepeatedTail(stored, counts), expected)


@given(token_lists(), st.tuples(*[st.integers(0, 8)] * 5))
def test_gradients_reach_stored_tokens_and_the_fill(lengths, keep):
    given_entries = [torch.randn(1, length, WIDTH, dtype=torch.float64, requires_grad=True) for length in lengths]
    fill = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    by_hand = replaced_by_hand(given_entries, keep[: len(lengths)], fill)
    tail = replace_tails(PackedList.pack(given_entries), keep[: len(lengths)], fill)
    weights = [torch.randn(entry.shape, dtype=torch.float64) for entry in by_hand]
    by_form = [
        torch.autograd.grad(
            sum((entry * weight).sum() for entry, weight in zip(form, weights, strict=True)),
            [*given_entries, fill],
            materialize_grads=True,
        )
        for form in (by_hand, tail)
    ]
    for mine, theirs in zip(*by_form, strict=True):
        assert max_difference(mine, theirs) < 1e-12


def test_nothing_to_replace_leaves_the_list_as_it_is():
    entries = entries_of([3, 4])
    assert replace_tails(entries, [3, 9], torch.zeros(WIDTH)) is entries


# --- one instead of many, in the decoder ------------------------------------------------------------------------------

EQUAL, MIXED = ((8, 8),) * 5, ((8, 8), (4, 8), (6, 2), (1, 1), (8, 3))
KEEP_KS = {
    "mixed": (3, 16, 1, 9, 5),
    "one": (1,) * 5,
    "half": (8,) * 5,
    "all_but_one": (15,) * 5,
    "all": (16,) * 5,
    "none": (0,) * 5,
    "more_than_there_are": (17, 1000, 16, 2, 64),
    "not_given": None,
}
FLAGS = {"conditional": None, "unconditional": (True,) * 5, "both": (True, False, True, False, False)}
SIZES = {"equal": EQUAL, "mixed": MIXED, "two_equal": EQUAL[:2], "one": EQUAL[:1]}

every_keep_k = pytest.mark.parametrize("keep_ks", KEEP_KS.values(), ids=KEEP_KS)
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
both_forms = pytest.mark.parametrize("form", ["mask_token", "packed"])


def all_outputs_read(model):
    """The decoder's outputs for registers are compared too: nobody else reads them, and its trunk is told so."""
    model.decoder.module_dict["dec_transformer"].output_subsequences = None
    return model


model_for = lru_cache(lambda form: all_outputs_read(small_tokenizer(form)).eval())


def inputs_for(sizes, keep_ks, flags, dtype=torch.float32):
    generator, batch = torch.Generator().manual_seed(0), len(sizes)
    data = {
        "enc_registers_quant": [torch.randn(1, REGISTERS, 6, generator=generator) for _ in sizes],
        "vae_latents_noised": [torch.randn(1, 3, h, w, generator=generator) for h, w in sizes],
        "timesteps": torch.rand(batch, generator=generator),
    }
    data = {key: value.to(dtype) if key == "timesteps" else [x.to(dtype) for x in value] for key, value in data.items()}
    given_values = {"eval_keep_k": keep_ks, "eval_dropout_mask": flags}
    return data | {key: list(values[:batch]) for key, values in given_values.items() if values is not None}


OUTPUTS = ("vae_latents_reconst", "dec_registers_proj", "dec_registers_repa_layer")


def decode(decoder, data, *, shortens_rows):
    packer = decoder.module_dict["dec_seq_packer"]
    packer.shortens_rows = shortens_rows
    try:
        return decoder(dict(data))
    finally:
        packer.shortens_rows = True


def outputs(decoded):
    return [(key, entry) for key in OUTPUTS for entry in decoded[key]]


def distinct_registers(keep_k, flag, *, form):
    """Registers that remain of 16 by the rules: one for all equal ones, none for those left out."""
    if form == "packed":
        kept = 16 if keep_k is None else min(keep_k, 16)
        return min(1, kept) if flag else kept
    return 1 if flag else min((16 if keep_k is None else keep_k) + 1, 16)


@both_forms
@every_size
@every_keep_k
@every_flag
@torch.no_grad()
def test_equal_tokens_computed_once_give_the_same_numbers(form, sizes, keep_ks, flags):
    decoder, data = model_for(form).decoder, inputs_for(sizes, keep_ks, flags)
    once, each = (decode(decoder, data, shortens_rows=value) for value in (True, False))
    rows = zip(sizes, keep_ks or [None] * 5, flags or [False] * 5, strict=False)
    expected = [h * w + distinct_registers(k, flag, form=form) for (h, w), k, flag in rows]
    assert list(once["dec_block_mask"].sample_lengths) == expected
    assert each["dec_block_mask"].last_counts is None
    assert [entry.shape[1] for entry in once["dec_registers_proj"]] == [REGISTERS] * len(sizes)
    for (key, mine), (_, theirs) in zip(outputs(once), outputs(each), strict=True):
        assert max_difference(mine, theirs) < 1e-5, key


@pytest.fixture
def double_norms(monkeypatch):
    """Norms and time embeddings are computed in float32, whatever goes in; here in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return all_outputs_read(small_tokenizer("mask_token")).double().eval().decoder


@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@every_flag
@torch.no_grad()
def test_in_double_precision_they_are_the_same_numbers(double_norms, backend, sizes, flags):
    """So that the small differences above are rounding, and not a bias that happens to be small."""
    double_norms.module_dict["dec_transformer"].attention_backend = backend
    data = inputs_for(sizes, KEEP_KS["mixed"], flags, torch.float64)
    once, each = (decode(double_norms, data, shortens_rows=value) for value in (True, False))
    for (key, mine), (_, theirs) in zip(outputs(once), outputs(each), strict=True):
        assert mine.dtype == torch.float64
        assert max_difference(mine, theirs) < 1e-10, key


@both_forms
@pytest.mark.parametrize("sizes", [EQUAL[:3], MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("keep_ks", [KEEP_KS["mixed"], KEEP_KS["none"], None], ids=["mixed", "none", "not_given"])
@every_flag
def test_gradients_in_evaluation_mode_are_the_same_too(form, sizes, keep_ks, flags):
    model, by_form = model_for(form), []
    parameters = [p for p in model.decoder.parameters() if p.requires_grad]
    for shortens_rows in (True, False):
        data = inputs_for(sizes, keep_ks, flags)
        quants = [quant.requires_grad_() for quant in data["enc_registers_quant"]]
        decoded = decode(model.decoder, data, shortens_rows=shortens_rows)
        # The loss looks at each copy of an equal token with other weights.
        generator = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=generator)).mean() for _, x in outputs(decoded))
        by_form.append(torch.autograd.grad(loss, [*quants, *parameters], materialize_grads=True))
    for mine, theirs in zip(*by_form, strict=True):
        assert max_difference(mine, theirs) < 1e-5 * max(1.0, float(theirs.abs().max()))
    assert any(gradient.any() for gradient in by_form[0])


@torch.no_grad()
def test_a_dictionary_that_is_used_again_does_not_keep_the_shapes_of_before():
    """As many tokens were packed both times, but the first time there were no others."""
    decoder = model_for("mask_token").decoder
    short = inputs_for(EQUAL[:2], None, None)
    short["enc_registers_quant"] = [quant[:, :3] for quant in short["enc_registers_quant"]]
    used = decoder(short)
    assert [entry.shape[1] for entry in used["dec_registers_proj"]] == [3, 3]
    again = decoder({**used, **inputs_for(EQUAL[:2], (2, 2), None)})
    assert again["dec_block_mask"].sample_lengths == used["dec_block_mask"].sample_lengths
    assert [entry.shape[1] for entry in again["dec_registers_proj"]] == [REGISTERS] * 2
    back = decoder({**again, "enc_registers_quant": short["enc_registers_quant"], "eval_keep_k": [3, 3]})
    assert [entry.shape[1] for entry in back["dec_registers_proj"]] == [3, 3]


# --- dropped tokens left out ------------------------------------------------------------------------------------------


@lru_cache
def masked_and_packed():
    """The same weights in both forms: each loads the other's, in both directions."""
    masked, packed = (
        all_outputs_read(small_tokenizer(form, "size.null_condition_prob=0.3")) for form in ("attention_mask", "packed")
    )
    packed.load_state_dict(masked.state_dict(), strict=True)
    masked.load_state_dict(packed.state_dict(), strict=True)
    return masked.train(), packed.train()


def training_step(model, sizes, seed, *, read_registers=True):
    generator = torch.Generator().manual_seed(7)
    data = {
        "vae_latents": [torch.randn(1, 3, h, w, generator=generator) for h, w in sizes],
        "rng": torch.Generator().manual_seed(seed),
    }
    out = model(data)
    seen = list(out["vae_latents_reconst"])
    if read_registers:
        kept = zip(out["dec_registers_proj"], out["train_keep_k"], strict=True)
        seen += [registers[:, :keep_k] for registers, keep_k in kept]
    weights = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=weights)).mean() for x in seen)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return out, seen, dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sizes", [EQUAL, MIXED, EQUAL[:1]], ids=["equal", "mixed", "one"])
def test_packed_training_equals_masked_training(sizes, seed):
    (masked, seen, expected), (packed, mine, gradients) = (
        training_step(model, sizes, seed) for model in masked_and_packed()
    )
    assert masked["nested_dropout_keep_k"] == packed["nested_dropout_keep_k"]
    for a, b in zip(mine, seen, strict=True):
        assert max_difference(a, b) < 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert max_difference(gradient, expected[name]) < 1e-5 * max(1.0, float(expected[name].abs().max())), name
    patches = [h * w for h, w in sizes]
    kept = packed["nested_dropout_keep_k"]
    assert packed["dec_block_mask"].num_tokens == sum(patches) + sum(kept)
    assert masked["dec_block_mask"].num_tokens == sum(patches) + REGISTERS * len(sizes)


@pytest.mark.parametrize("form", ["attention_mask", "packed"])
def test_padding_the_row_changes_nothing(form):
    """Few different row lengths for compiled graphs, the same numbers."""
    plain, padded = (
        all_outputs_read(small_tokenizer(form, f"model.decoder.module_dict.dec_seq_packer.pad_to_multiple={multiple}"))
        for multiple in ("null", 128)
    )
    (_, seen, expected), (out, mine, gradients) = (training_step(model.train(), MIXED, 3) for model in (plain, padded))
    assert out["dec_packed_seq"].shape[1] % 128 == 0
    for a, b in zip(mine, seen, strict=True):
        assert max_difference(a, b) < 1e-5
    for name, gradient in gradients.items():
        assert max_difference(gradient, expected[name]) < 1e-5 * max(1.0, float(expected[name].abs().max())), name


def test_names_and_shapes_of_the_weights_are_those_of_the_masked_form():
    masked, packed = masked_and_packed()
    assert [(n, t.shape) for n, t in masked.state_dict().items()] == [
        (n, t.shape) for n, t in packed.state_dict().items()
    ]


def registers_read(data):
    return [0 if null else keep_k for keep_k, null in zip(data["train_keep_k"], data["sampled_null"], strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_what_the_decoder_will_drop_is_left_out_of_the_encoder_and_nothing_changes(form, sizes, backend):
    model = small_tokenizer(form, "size.null_condition_prob=0.3").train()
    set_attention_backend(model, backend)
    out, seen, gradients = training_step(model, sizes, 2)
    assert sum(out["sampled_null"]) == 2
    read = [size for size, null in zip(sizes, out["sampled_null"], strict=True) if not null]
    row = sum(h * w for h, w in read) + sum(registers_read(out))
    assert out["enc_packed_seq"].shape[1] == row < sum(h * w for h, w in sizes) + REGISTERS * len(sizes)
    packer = model.encoder.module_dict["enc_seq_packer"]
    packer.sampled_keep_k_read_key = packer.sampled_null_read_key = None
    whole, theirs, expected = training_step(model, sizes, 2)
    assert whole["enc_packed_seq"].shape[1] == sum(h * w for h, w in sizes) + REGISTERS * len(sizes)
    assert whole["train_keep_k"] == out["train_keep_k"]
    assert [x.shape for x in out["enc_vae_latents_patched"]] == [x.shape for x in whole["enc_vae_latents_patched"]]
    for a, b in zip(seen, theirs, strict=True):
        assert max_difference(a, b) < 1e-5
    for ids, all_ids, keep_k in zip(out["tokens"], whole["tokens"], registers_read(out), strict=True):
        assert torch.equal(ids[:, :keep_k], all_ids[:, :keep_k])
    for name, gradient in gradients.items():
        assert max_difference(gradient, expected[name]) < 1e-5 * max(1.0, float(expected[name].abs().max())), name


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_nothing_but_the_null_condition_is_encoded_none_the_less(form):
    model = small_tokenizer(form, "size.null_condition_prob=1").train()
    out, _, gradients = training_step(model, EQUAL, 0)
    assert all(out["sampled_null"])
    assert out["enc_packed_seq"].shape[1] == sum(h * w for h, w in EQUAL) + sum(out["train_keep_k"])
    assert gradients["decoder.module_dict.dec_latent_dropout.nullcond"].any()


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_encodes_all_registers_whatever_training_left_in_the_dictionary(form):
    model = small_tokenizer(form).train()
    data, _, _ = training_step(model, EQUAL, 5)
    latents = {"vae_latents": data["vae_latents"]}
    with torch.no_grad():
        after, fresh = (model.eval().encode(dict(given)) for given in (data, latents))
    assert after["enc_packed_seq"].shape == fresh["enc_packed_seq"].shape
    assert all(torch.equal(a, b) for a, b in zip(after["tokens"], fresh["tokens"], strict=True))


def test_ids_are_refused_in_training_mode_where_some_would_be_missing():
    model, images = small_tokenizer("packed"), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="call model.eval"):
        model.train().tokenize(images)
    assert model.eval().tokenize(images)[0].shape == (1, REGISTERS)


def test_an_encoder_whose_tokens_all_see_each_other_leaves_none_out():
    with pytest.raises(
        InstantiationException, match="sampled_keep_k_read_key='sampled_keep_k'.*give null, or mask_mode=causal_last"
    ):
        small_tokenizer("packed", "model.encoder.module_dict.enc_seq_packer.mask_mode=full")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_outputs_that_nobody_reads_are_left_out_of_the_last_block_and_nothing_changes(form, sizes):
    model = small_tokenizer(form).train()
    trunks = [model.encoder.module_dict["enc_transformer"], model.decoder.module_dict["dec_transformer"]]
    rows = []
    for trunk in trunks:
        trunk.blocks[-1].mlp.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[1]))
    out, _, gradients = training_step(model, sizes, 5, read_registers=False)
    assert rows == [sum(registers_read(out)), sum(h * w for h, w in sizes)]
    assert not any(registers.any() for registers in out["dec_registers_proj"])
    for trunk in trunks:
        trunk.output_subsequences = None
    whole, _, expected = training_step(model, sizes, 5, read_registers=False)
    assert rows[2:] == [whole["enc_packed_seq"].shape[1], whole["dec_packed_seq"].shape[1]]
    for key in ("tokens", "vae_latents_reconst", "dec_patches_repa_layer", "dec_registers_repa_layer"):
        for mine, theirs in zip(out[key], whole[key], strict=True):
            assert max_difference(mine, theirs) < 1e-5, key
    for name, gradient in gradients.items():
        assert max_difference(gradient, expected[name]) < 1e-5 * max(1.0, float(expected[name].abs().max())), name


# --- where equal tokens do not stay equal -----------------------------------------------------------------------------


def packer(**options):
    arguments = {"packed_seq_write_key": "x", "block_mask_write_key": "mask"}
    shapes = {"inner_packed_shapes_write_key": "inner", "outer_packed_shapes_write_key": "outer"}
    return BlockWiseSequencePacker(["patches", "registers"], **arguments, **shapes, **options)


def packable():
    tail = RepeatedTail(entries_of([2, 1, 4]), [5, 6, 1])
    return {"patches": list(entries_of([4, 3, 2])), "registers": tail}


def test_of_equal_tokens_one_is_packed_under_the_full_mask():
    data = packer()(packable())
    assert data["mask"] == SequenceLayout(((4, 2), (3, 1), (2, 4)), total=16, last_counts=(5, 6, 1))


@pytest.mark.parametrize(
    "options",
    [{"mask_mode": "causal"}, {"mask_mode": "causal_last"}, {"return_materialized_mask": True}],
    ids=lambda options: "_".join(map(str, options.values())),
)
def test_all_are_packed_where_they_would_be_told_apart_or_not_counted(options):
    data = packer(**options)(packable())
    assert data["x"].shape[1] == 9 + 6 + 6 + 4
    if "mask_mode" in options:
        assert data["mask"].lengths == ((4, 6), (3, 6), (2, 4))
        assert data["mask"].last_counts is None
    unpacked = SequenceUnpacker("x", ["patches_back", "registers_back"], "inner", "outer")(data)
    for entry, expected in zip(unpacked["registers_back"], packable()["registers"], strict=True):
        assert entry.shape == expected.shape


TRUNK = {"dim": 16, "depth": 2, "head_dim": 8}


def rotated(q, k, v):
    return (*(x * torch.cos(0.3 * torch.arange(x.shape[2], dtype=x.dtype))[:, None] for x in (q, k)), v)


def distance(score, b, h, q_idx, kv_idx):
    return score - 0.3 * (q_idx - kv_idx).abs()


POSITIONS = {"rope_forward_read_key": rotated, "score_mod_read_key": distance}


def pipeline_with(key):
    trunk = FlexTransformer("x", "x", block_mask_read_key="mask", **TRUNK, **({key: "position"} if key else {}))
    unpacker = SequenceUnpacker("x", ["out_patches", "out_registers"], "inner", "outer")
    return SequentialModuleDictWrapper({"packer": packer(), "trunk": randomize(trunk), "unpacker": unpacker})


def pipeline_inputs(key):
    """Two samples, so that a score function of the row's positions sees where the second one begins."""
    stored = PackedList.pack([torch.randn(1, n, 16) for n in (2, 3)])
    data = {"patches": [torch.randn(1, 4, 16), torch.randn(1, 2, 16)], "registers": RepeatedTail(stored, [5, 2])}
    return data | {"position": POSITIONS.get(key)}


@pytest.mark.parametrize("key", POSITIONS)
@torch.no_grad()
def test_a_trunk_that_knows_positions_gets_all_tokens(key):
    pipeline, data = pipeline_with(key).eval(), pipeline_inputs(key)
    assert not pipeline.module_dict["packer"].shortens_rows
    out = pipeline(dict(data))
    assert out["mask"].lengths == ((4, 6), (2, 4))
    whole = pipeline({**data, "registers": list(data["registers"])})
    for mine, theirs in zip(out["out_registers"], whole["out_registers"], strict=True):
        assert torch.equal(mine, theirs)
    # Positions matter, so that one of the equal tokens could not have stood for all.
    assert max_difference(out["out_registers"][0][:, -1], out["out_registers"][0][:, -2]) > 1e-3


@pytest.mark.parametrize("key", POSITIONS)
def test_counting_for_such_a_trunk_all_the_same_is_an_error(key):
    pipeline = pipeline_with(key)
    pipeline.module_dict["packer"].shortens_rows = True
    with pytest.raises(ValueError, match="shortens_rows=False"):
        pipeline(pipeline_inputs(key))


@pytest.mark.parametrize("key", ["sa_score_mod_read_key", "xa_score_mod_read_key", "rope_forward_read_key"])
def test_a_trunk_with_a_context_that_knows_positions_gets_all_tokens_too(key):
    trunk = FlexTransformerDecoder("x", "context", "x", **{key: "position"}, **TRUNK)
    assert not SequentialModuleDictWrapper({"packer": packer(), "trunk": trunk}).module_dict["packer"].shortens_rows


@torch.no_grad()
def test_without_positions_the_same_pipeline_counts():
    pipeline, data = pipeline_with(None).eval(), pipeline_inputs(None)
    out = pipeline(dict(data))
    assert out["mask"].last_counts == (5, 2)
    whole = pipeline({**data, "registers": list(data["registers"])})
    assert whole["mask"].last_counts is None
    for key in ("out_patches", "out_registers"):
        for mine, theirs in zip(out[key], whole[key], strict=True):
            assert max_difference(mine, theirs) < 1e-5


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_score_function_acts_under_a_layout_as_under_its_dense_mask(needs_grad):
    trunk = randomize(FlexTransformer("x", "y", block_mask_read_key="m", score_mod_read_key="s", **TRUNK))
    layout = SequenceLayout(((2, 4), (3, 1)), keep_last=(2, 1), total=12)
    data = {"x": torch.randn(1, 12, 16), "s": distance}
    with torch.set_grad_enabled(needs_grad):
        by_layout = trunk({**data, "m": layout})["y"]
        by_mask = trunk({**data, "m": layout.dense_mask()})["y"]
        without = trunk({**data, "m": layout, "s": None})["y"]
    assert max_difference(by_layout, by_mask) < 1e-5
    assert max_difference(by_layout, without) > 1e-3


def test_score_functions_of_a_trunk_with_a_context():
    keys = {"sa_block_mask_read_key": "m", "xa_block_mask_read_key": "m", "sa_score_mod_read_key": "s"}
    trunk = randomize(FlexTransformerDecoder("x", "c", "y", xa_score_mod_read_key="none", **keys, **TRUNK))
    layout = SequenceLayout(((2, 4), (3, 1)))
    data = {"x": torch.randn(1, 10, 16), "c": torch.randn(1, 10, 16), "s": distance, "none": None}
    with torch.no_grad():
        by_layout, by_mask = (trunk({**data, "m": mask})["y"] for mask in (layout, layout.dense_mask()))
    assert max_difference(by_layout, by_mask) < 1e-5
