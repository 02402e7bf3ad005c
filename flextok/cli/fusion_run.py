"""Answering questions as settings of paraphrase fusion say, into a file."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextok.cli.fusion_questions import Question, Questions
from flextok.cli.fusion_settings import FusionSettings

if TYPE_CHECKING:
    from flextok.cli.fusion_scores import AnswerFile
    from flextok.fusion.answerer import Answerer
    from flextok.fusion.lemmas import Lemmatizer
    from flextok.fusion.methods import Answer
    from flextok.fusion.prompts import PromptStyle
    from flextok.fusion.result_file import ResultFile

Weights = Mapping[str, Sequence[float]]
"""By uuid of a question: how much each of its wordings counts."""


def load_answerer(settings: FusionSettings) -> "Answerer":
    """The model on its device, ready to answer.

    Raises:
        ValueError: there is no such model or device.
    """
    import torch

    from flextok.evaluation.device import pick_device
    from flextok.fusion.answerer import Answerer
    from flextok.fusion.language_model import load_language_model

    device = pick_device(settings.device, field="fusion.device")
    loaded: Any = load_language_model(settings.model, device="cpu")
    model, tokenizer = loaded
    model.to(device=device, dtype=None if settings.dtype is None else getattr(torch, settings.dtype))
    return Answerer(model, tokenizer, settings.method_options())


def result_path(settings: FusionSettings) -> Path:
    """Where the answers go."""
    from flextok.fusion.results import result_name

    count = None if settings.indices is not None else settings.num_paraphrases
    name = result_name(settings.method, num_paraphrases=count, indices=settings.indices)
    return Path(settings.out).expanduser() / f"{name}.{settings.format}"


def finished_answers(settings: FusionSettings) -> "AnswerFile | None":
    """The answers of an earlier run, or None if there are none or they are to be replaced.

    ValueError if the file that is there was made with other settings.
    """
    from flextok.cli.fusion_scores import read_answer_file

    path = result_path(settings)
    if settings.overwrite or not path.exists():
        return None
    file = read_answer_file(path, name=path.stem)
    for name, value in settings.recorded().items():
        # Lemmas may be others by now: a command of its own changes them.
        if name != "lemmatizer" and file.run_config.get(name) != value:
            raise ValueError(
                f"{path} was made with {name}={file.run_config.get(name)!r}, this run has {value!r}; valid: another "
                "fusion.out, or fusion.overwrite=true"
            )
    return file


def answer_with_progress(
    settings: FusionSettings, questions: Questions, weights: Weights | None, answerer: "Answerer | None" = None
) -> "AnswerFile":
    """Answer all questions, or those that an interrupted run left, with a bar on the terminal.

    Args:
        answerer: None loads the model, when it is certain that the file can be written.

    Raises:
        FileExistsError, ValueError: as `ResultFile` and `Answerer` do.
    """
    from tqdm import tqdm

    from flextok.cli.fusion_scores import answer_file
    from flextok.fusion.lemmas import make_lemmatizer
    from flextok.fusion.matching import lemma_match
    from flextok.fusion.result_file import ResultFile

    lemmatizer = make_lemmatizer(settings.lemmatizer)
    run_config = settings.recorded() | {"lemmatizer": lemmatizer.name}
    path = result_path(settings)
    if path.exists() and not settings.overwrite:
        raise FileExistsError(f"{path} exists already; fusion.overwrite=true writes it anew")
    right, counted = {"exact": 0, "contains": 0}, 0
    with ResultFile(path, run_config, overwrite=settings.overwrite, resume=settings.resume) as results:
        answerer = answerer or load_answerer(settings)
        steps = answer_all(answerer, questions, weights, results, lemmatizer, batch_size=settings.batch_size)
        with tqdm(total=len(questions), initial=next(steps), desc=settings.method, unit="question") as bar:
            for done in steps:
                new, counted = results.rows[counted:], len(results.rows)
                for mode in right:
                    right[mode] += sum(lemma_match(row["predict_lemma"], row["answer_lemmas"], mode) for row in new)
                bar.set_postfix({mode: f"{count / counted:.3f}" for mode, count in right.items()}, refresh=False)
                bar.update(done - bar.n)
    return answer_file(path.stem, results.rows, results.run_config)


def answer_all(
    answerer: "Answerer",
    questions: Questions,
    weights: Weights | None,
    results: "ResultFile",
    lemmatizer: "Lemmatizer",
    *,
    batch_size: int,
) -> Iterator[int]:
    """Answer what is not in `results` yet, batch by batch; yields how many questions are done, those before included.

    The file also says what was measured over the questions of this call.
    """
    from flextok.fusion.lemmas import add_lemmas

    is_by_wording = answerer.options.method == "per_prompt"
    missing = [
        question
        for question in questions.questions
        if any((question.item.uuid, variant) not in results.done for variant in _variants(question, is_by_wording))
    ]
    measured = {"questions": 0, "prompt_tokens": 0, "new_tokens": 0, "seconds": 0.0}
    yield len(questions) - len(missing)
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        of_batch = None if weights is None else [weights[question.item.uuid] for question in batch]
        try:
            answers = answerer.answer([question.texts for question in batch], of_batch)
        except ValueError as error:
            first, last = batch[0].item.uuid, batch[-1].item.uuid
            raise ValueError(f"in the batch from question {first!r} to {last!r}: {error}") from error
        rows = [
            _row(question, answer, variant, questions.style, lemmatizer)
            for question, of_question in zip(batch, answers, strict=True)
            for answer, variant in zip(of_question, _variants(question, is_by_wording), strict=True)
        ]
        # A kill may have cut a question off between two of its wordings.
        new = [row for row in rows if (row["uuid"], row.get("variant")) not in results.done]
        results.add(add_lemmas(new, lemmatizer))
        flat = [answer for of_question in answers for answer in of_question]
        measured["questions"] += len(batch)
        measured["prompt_tokens"] += sum(answer.num_prompt_tokens for answer in flat)
        measured["new_tokens"] += sum(answer.num_new_tokens for answer in flat)
        measured["seconds"] += sum(answer.seconds for answer in flat)
        results.run_config["measured"] = {**measured, "device": str(answerer.model.device)}
        yield len(questions) - len(missing) + start + len(batch)


def _variants(question: Question, is_by_wording: bool) -> Sequence[int | None]:
    return question.variants if is_by_wording else [None]


def _row(
    question: Question, answer: "Answer", variant: int | None, style: "PromptStyle", lemmatizer: "Lemmatizer"
) -> dict[str, Any]:
    from flextok.fusion.matching import confidence

    prediction = style.prediction(answer.text)
    row: dict[str, Any] = {**vars(question.item), "prediction": prediction, "generation": answer.text}
    if variant is not None:
        place = question.variants.index(variant)
        row |= {"variant": variant, "paraphrase": question.item.paraphrases[place]}
        row["prompt"] = question.texts.full()[place]
    if answer.samples:
        greedy, *samples = lemmatizer([prediction, *map(style.prediction, answer.samples)])
        row["confidence"] = confidence(greedy, samples)
    return row
