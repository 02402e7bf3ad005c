"""Which split an image belongs to, decided by a hash of its name: new images do not move the others."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

from flextok.data.datamodule import Split

SPLITS: tuple[Split, ...] = ("train", "val", "test")
_log = logging.getLogger(__name__)


def split_by_hash(names: Sequence[str], fractions: Mapping[Split, float]) -> dict[Split, list[int]]:
    """Hold out a part for each split in `fractions` (`val`, `test` or both); the rest is `train`.

    In each split names are in the order of their hashes, so that the first few are a fair sample. Too few names for
    the fractions give each split one all the same.

    Returns:
        Positions in `names`.

    Raises:
        ValueError: A fraction is not positive, or nothing is left for `train`.
    """
    if any(fraction <= 0 for fraction in fractions.values()) or sum(fractions.values()) >= 1:
        given = " and ".join(f"data.{split}_fraction={fraction}" for split, fraction in fractions.items())
        raise ValueError(f"{given} cannot be used; valid: each positive, and their sum less than 1")
    if len(names) <= len(fractions):
        raise ValueError(
            f"there are {len(names)} images for {', '.join(['train', *fractions])}, which need at least one each"
        )
    hashes = [hash_fraction(name) for name in names]
    order = sorted(range(len(names)), key=lambda number: (hashes[number], names[number]))
    parts: dict[Split, list[int]] = {}
    start, reached = 0, 0.0
    # `test` first: another part for `val` leaves it alone.
    held_out = [split for split in reversed(SPLITS) if split in fractions]
    for place, split in enumerate(held_out, start=1):
        by_hash = sum(reached <= value < reached + fractions[split] for value in hashes)
        # One each for the splits that are still to come, train included.
        size = min(max(by_hash, 1), len(names) - start - (len(held_out) - place + 1))
        if size != by_hash:
            _log.warning(
                "only %d images: %s has %d of them, so that no split is empty; which ones may change when images "
                "are added",
                *(len(names), split, size),
            )
        parts[split] = order[start : start + size]
        start, reached = start + size, reached + fractions[split]
    return {"train": order[start:], **parts}


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone and is spread evenly."""
    digest = blake2b(_bytes(name), digest_size=8).digest()
    # Of the 64 bits, the 53 that a float can hold: all 64 could round to 1.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def hash_of_names(names: Iterable[str]) -> str:
    """One hash of all names in their order."""
    return blake2b(_bytes("\0".join(names)), digest_size=16).hexdigest()


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
