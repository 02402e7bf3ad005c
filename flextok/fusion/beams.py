"""Beam search: the best few beginnings of each text are continued at once."""

from typing import NamedTuple

import torch
from torch import Tensor

from flextok.fusion.decoding import Decoded, Rows, Stopping


class _Text(NamedTuple):
    score: float
    tokens: list[int]


def beam_search(rows: Rows, scores: Tensor, stopping: Stopping, *, beams: int, length_penalty: float) -> Decoded:
    """The best text of each row; `scores` are those of its first token, `[rows, vocabulary]`.

    A row is done when its `beams` best finished texts are at least as good as its best unfinished one is by now.
    """
    num_texts, vocabulary = scores.shape
    device = scores.device
    rows.select(torch.arange(num_texts, device=device).repeat_interleave(beams))
    # Equal beginnings would only do the same: all but one are as improbable as can be.
    sums = torch.full((num_texts, beams), float("-inf"), dtype=torch.float64, device=device)
    sums[:, 0] = 0.0
    scores = scores.repeat_interleave(beams, dim=0)
    unfinished: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(num_texts)]
    finished: list[list[_Text]] = [[] for _ in range(num_texts)]
    done = [False] * num_texts
    # So many that enough are left after each beam has ended in each way.
    width = min(beams * (1 + len(set(stopping.eos_token_ids))), beams * vocabulary)

    for length in range(1, stopping.max_new_tokens + 1):
        totals = sums[..., None] + rows.log_probs(scores).double().view(num_texts, beams, vocabulary)
        best, places = totals.flatten(1).topk(width, dim=-1)
        stops = stopping.stops(places % vocabulary).tolist()
        sources, next_tokens, next_sums = [], [], []
        for text, (totals_of, places_of, stops_of) in enumerate(
            zip(best.tolist(), places.tolist(), stops, strict=True)
        ):
            kept: list[tuple[int, int, float]] = []
            for rank, (total, place, is_end) in enumerate(zip(totals_of, places_of, stops_of, strict=True)):
                beam, token = divmod(place, vocabulary)
                if is_end and rank < beams and not done[text] and total > float("-inf"):
                    finished[text].append(_Text(total / length**length_penalty, [*unfinished[text][beam], token]))
                elif not is_end and len(kept) < beams:
                    kept.append((beam, token, total))
            # A tiny vocabulary may leave too few: the places are filled with what can never win.
            kept += [(0, stopping.pad_token_id, float("-inf"))] * (beams - len(kept))
            unfinished[text] = [[*unfinished[text][beam], token] for beam, token, _ in kept]
            sources += [text * beams + beam for beam, _, _ in kept]
            next_tokens += [token for _, token, _ in kept]
            next_sums.append([total for *_, total in kept])
            finished[text] = sorted(finished[text], key=lambda text: -text.score)[:beams]
            is_full = len(finished[text]) == beams
            done[text] = done[text] or (is_full and finished[text][-1].score >= kept[0][2] / length**length_penalty)
            if length == stopping.max_new_tokens and not done[text]:
                finished[text] += [
                    _Text(t / length**length_penalty, u) for u, t in zip(unfinished[text], next_sums[-1], strict=True)
                ]
        if all(done) or length == stopping.max_new_tokens:
            break
        sums = torch.tensor(next_sums, dtype=torch.float64, device=device)
        rows.select(torch.tensor(sources, device=device))
        scores = rows.step(torch.tensor(next_tokens, device=device))

    texts = [max(candidates, key=lambda text: text.score).tokens for candidates in finished]
    sequences = torch.full((num_texts, max(map(len, texts))), stopping.pad_token_id, device=device)
    for row, tokens in zip(sequences, texts, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, device=device)
    return Decoded(sequences, torch.tensor([*map(len, texts)], device=device))
