"""The same name gives the same numbers, another name gives others."""

import torch

from flextok.seeding import image_generator, image_generators, mixed_seed


def test_seeds_are_the_same_on_every_machine():
    assert mixed_seed(0, "photo.png", 3) == 3721805891169685931


def test_type_place_and_borders_of_the_parts_count():
    seeds = {
        mixed_seed(),
        mixed_seed(0),
        mixed_seed("0"),
        mixed_seed(0, 1),
        mixed_seed(1, 0),
        mixed_seed(10),
        mixed_seed("ab", "c"),
        mixed_seed("a", "bc"),
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_image_generators_differ_by_seed_key_and_stream_only():
    def draw(*args, **kwargs):
        return torch.randn(4, generator=image_generator(*args, **kwargs))

    assert torch.equal(draw(0, "a"), draw(0, "a"))
    for other in (draw(1, "a"), draw(0, "b"), draw(0, "a", stream="encode")):
        assert not torch.equal(draw(0, "a"), other)


def test_an_image_meets_the_same_numbers_in_any_batch():
    def draws(keys, stream):
        return [torch.randn(4, generator=generator) for generator in image_generators(0, keys, stream=stream)]

    alone = draws(["b"], "encode")[0]
    assert torch.equal(draws(["a", "b", "c"], "encode")[1], alone)
    assert not torch.equal(draws(["b"], "decode")[0], alone)
