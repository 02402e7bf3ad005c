"""New wordings of questions, by the language model that will answer them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextok.fusion.items import Item
from flextok.fusion.journal import Journal
from flextok.fusion.prompts import first_line
from flextok.fusion.rewording_examples import EXAMPLE_SETS, INSTRUCTION
from flextok.seeding import mixed_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_ROUNDS = len(EXAMPLE_SETS)
MAX_EXAMPLES = min(map(len, EXAMPLE_SETS))


class Rewriter:
    """Samples one new wording of a question in each round; every round shows the model other examples.

    What is drawn for an item depends on `seed` and its uuid alone; no global random state is touched.

    Args:
        model: A causal language model of transformers, on the device it is to run on.
        tokenizer: Its tokenizer.
        num_rounds: New wordings per item, at most `NUM_ROUNDS`.
        num_examples: Examples in each prompt, at most `MAX_EXAMPLES`.
        temperature: Of the sampling.
        top_p: The most likely tokens that together have this probability are sampled from.
        max_new_tokens: Length of a wording; what comes after the first line is dropped.
        seed: Of the sampling.

    Raises:
        ValueError: A number is out of range; when called, a prompt and its new tokens are more than the model reads.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        num_rounds: int = NUM_ROUNDS,
        num_examples: int = MAX_EXAMPLES,
        temperature: float = 1.5,
        top_p: float = 0.9,
        max_new_tokens: int = 30,
        seed: int = 0,
    ) -> None:
        if not 1 <= num_rounds <= NUM_ROUNDS:
            raise ValueError(f"num_rounds={num_rounds}; valid: 1 to {NUM_ROUNDS}")
        if not 0 <= num_examples <= MAX_EXAMPLES:
            raise ValueError(f"num_examples={num_examples}; valid: 0 to {MAX_EXAMPLES}")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}; it must be above 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}; valid: above 0, up to 1")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}; it must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.settings: dict[str, Any] = {
            "num_rounds": num_rounds,
            "num_examples": num_examples,
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }

    def __call__(self, item: Item) -> Item:
        """The item with its first wording and the new ones; a round that gives an empty line gives none."""
        prompts = [
            rewording_prompt(item.paraphrases[0], number, num_examples=self.settings["num_examples"])
            for number in range(self.settings["num_rounds"])
        ]
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        needed = max(map(len, ids)) + self.settings["max_new_tokens"]
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and needed > context:
            raise ValueError(
                f"item {item.uuid!r}: prompt and new tokens are {needed}, and the model reads {context}; show it fewer "
                "examples, or ask for fewer new tokens"
            )
        new = [first_line(text) for text in self._generate(ids, mixed_seed(self.settings["seed"], item.uuid))]
        return Item(item.uuid, item.answers, [item.paraphrases[0], *(text for text in new if text)])

    def _generate(self, ids: Sequence[list[int]], seed: int) -> list[str]:
        import torch

        length = max(map(len, ids))
        # Which id fills up does not matter: nobody attends to it.
        rows = torch.tensor([[0] * (length - len(row)) + row for row in ids], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=self.model.device)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        # `generate` takes no generator: it draws from the global one, which is put back afterwards.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            out = self.model.generate(  # type: ignore[operator]
                rows,
                attention_mask=mask,
                do_sample=True,
                temperature=self.settings["temperature"],
                top_p=self.settings["top_p"],
                top_k=0,  # transformers would cut at 50
                max_new_tokens=self.settings["max_new_tokens"],
                pad_token_id=0 if pad is None else pad,
            )
        return self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)


def rewording_prompt(question: str, number: int, *, num_examples: int = MAX_EXAMPLES) -> str:
    """The prompt of one round: an instruction, its examples, the question."""
    shown = [f"Question: {before}\nRephrased: {after}" for before, after in EXAMPLE_SETS[number][:num_examples]]
    return "\n\n".join([INSTRUCTION, *shown, f"Question: {question}\nRephrased:"])


def write_rewordings(
    path: str | Path, items: Sequence[Item], rewriter: Rewriter, *, model_name: str, report: Any = None
) -> int:
    """Write each item with its new wordings as a line of JSON, which `read_items` reads; go on where a file ends.

    Each line also says how it was made, under `rewording`. Lines are on the disk one by one: a kill loses at most the
    item that was being worked on.

    Args:
        path: The file, new or from an interrupted call.
        items: The items; those in the file already are not done again.
        rewriter: Makes the wordings.
        model_name: What the lines call the model.
        report: Called with the number of items done, in steps.

    Returns:
        How many items were done by this call.

    Raises:
        ValueError: The file was made with other settings or of other items, is damaged, or another process writes it.
    """
    settings = {"model": model_name, **rewriter.settings}
    known = {item.uuid for item in items}
    journal = Journal(path)
    try:
        for number, record in enumerate(journal.records, start=1):
            if record.get("rewording") != settings:
                raise ValueError(
                    f"{path}, line {number}: made with {record.get('rewording')}, this call has {settings}"
                )
            if record.get("uuid") not in known:
                raise ValueError(f"{path}, line {number}: uuid={record.get('uuid')!r} is none of the items")
        done = {record["uuid"] for record in journal.records}
        if report is not None:
            report(len(done))
        missing = [item for item in items if item.uuid not in done]
        for item in missing:
            new = rewriter(item)
            record = {"uuid": new.uuid, "answers": new.answers, "paraphrases": new.paraphrases, "rewording": settings}
            journal.add([record])
            if report is not None:
                report(1)
    finally:
        journal.close()
    return len(missing)
