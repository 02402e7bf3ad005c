"""What a language model is trained on: text files, and questions as JSON lines."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flextok.fusion.items import read_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


class Document(NamedTuple):
    """A text, or a question and its answer; what is learned of it is all of `beginnings[0] + ending`."""

    source: str
    beginnings: list[str]
    """A text; or the wordings of a question, `Q: {wording}`, that which the document is for first."""
    ending: str
    """Nothing; or what follows any of the wordings, `\\nA: {answer}\\n`."""

    @property
    def text(self) -> str:
        """All of it, in its own wording."""
        return self.beginnings[0] + self.ending


class Example(NamedTuple):
    """Token ids of a document or of a piece of it; its own wording first."""

    beginnings: list[list[int]]
    ending: list[int]


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """A `.jsonl` file has a document for every wording of every item; any other file is one, as it is.

    Raises:
        ValueError: A file is empty or not UTF-8, or a line is not an item (`flextok.fusion.items`).
        OSError: A file cannot be read.
    """
    documents = []
    for path in paths:
        if path.suffix == ".jsonl":
            for item in read_items(path):
                wordings = [f"Q: {wording}" for wording in item.paraphrases]
                for number, wording in enumerate(wordings):
                    others = wordings[:number] + wordings[number + 1 :]
                    source = f"{path}, item {item.uuid}"
                    documents.append(Document(source, [wording, *others], f"\nA: {item.answers[0]}\n"))
        else:
            documents.append(Document(str(path), [_read_text(path)], ""))
    return documents


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; valid: a text")
    return text


def data_sha256(documents: Iterable[Document]) -> str:
    """Of the texts in their order; where the files lie does not count."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()


def train_tokenizer(documents: Iterable[Document], *, vocab_size: int, context: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE, which can write any text; it puts BOS before a text unless told to add no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, so that a number is written alike wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return wrap_tokenizer(tokenizer.to_str(), context=context)


def wrap_tokenizer(content: str, *, context: int) -> "PreTrainedTokenizerFast":
    """The tokenizer whose `tokenizer.json` is `content`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerFast", *, context: int
) -> list[Example]:
    """Token ids of the examples.

    A text is `BOS ... EOS`, cut into pieces of at most `context + 1` tokens that share one token with the next: every
    token but BOS is predicted exactly once. Questions stay whole.

    Raises:
        ValueError: A question and its answer are longer than the context.
    """
    examples = []
    for document in documents:
        beginnings = [tokenizer(text, verbose=False)["input_ids"] for text in document.beginnings]
        if document.ending:
            ending = tokenizer(document.ending, add_special_tokens=False)["input_ids"]
            longest = max(map(len, beginnings)) + len(ending)
            if longest > context:
                raise ValueError(f"{document.source} has {longest} tokens; context={context} must be at least that")
            examples.append(Example(beginnings, ending))
        else:
            ids = [*beginnings[0], tokenizer.eos_token_id]
            pieces = (ids[start : start + context + 1] for start in range(0, len(ids) - 1, context))
            examples += [Example([piece], []) for piece in pieces]
    return examples
