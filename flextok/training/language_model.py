"""Train a small causal language model of transformers from scratch, on texts or on questions and answers.

The result is a plain folder for `AutoModelForCausalLM` and `AutoTokenizer`. A killed training goes on where its last
checkpoint was and ends with the same weights: what a step does depends on the seed and its number alone.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flextok.provenance import package_versions
from flextok.seeding import mixed_seed
from flextok.training.language_batch import IGNORED, LanguageBatch, examples_of_step, make_batch
from flextok.training.language_data import (
    Document,
    Example,
    data_sha256,
    encode_documents,
    read_documents,
    train_tokenizer,
    wrap_tokenizer,
)
from flextok.training.language_settings import LanguageModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
RECORD = "training.json"
_NUM_REPORTS = 20
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train_language_model(
    data: Sequence[Path],
    folder: Path,
    settings: LanguageModelSettings,
    *,
    valid: Sequence[Path] = (),
    device: torch.device,
    save_every: int,
) -> dict[str, Any]:
    """Train, or go on with what `folder` holds; writes model, tokenizer and `training.json`, the content of which is
    returned.

    Args:
        valid: files of which loss and perplexity per token are measured at the end.
        save_every: steps from one checkpoint to the next; the last one goes when the model is written.

    Raises:
        ValueError: The data are not usable, or the folder holds something else.
        OSError: A file cannot be read or written.
    """
    documents, held_out = read_documents(data), read_documents(valid)
    record: dict[str, Any] = {"data_sha256": data_sha256(documents), "settings": asdict(settings)}
    if held_out:
        record["valid_sha256"] = data_sha256(held_out)
    finished, state = _open(folder, record)
    if finished is not None:
        logger.info("%s: is trained already", folder)
        return finished
    run = _Run(documents, settings, state, device)
    held_out_examples = encode_documents(held_out, run.tokenizer, context=settings.context)
    folder.mkdir(parents=True, exist_ok=True)
    run.fit(folder / CHECKPOINT, record, save_every=save_every)
    record |= {
        "data": [path.name for path in data],
        "parameters": run.model.num_parameters(),
        "vocab_size": len(run.tokenizer),
        "losses": run.mean_losses(settings.steps),
        "versions": package_versions(),
    }
    run.round_weights()
    if held_out:
        record["valid"] = {"data": [path.name for path in valid], **run.evaluate(held_out_examples)}
    run.write(folder)
    _write_atomically(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return record


def build_language_model(settings: LanguageModelSettings, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """Tied embeddings, rotary positions, keys and values shared by groups of heads; weights drawn from the seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        settings.family,
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(settings.seed, "weights"))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model


def lr_factor(step: int, steps: int) -> float:
    """Warms up over the first twentieth of the steps, then falls as a cosine, to 0 after the last one."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class _Run:
    """A model under training, with all that a checkpoint needs."""

    def __init__(
        self,
        documents: Sequence[Document],
        settings: LanguageModelSettings,
        state: dict[str, Any] | None,
        device: torch.device,
    ) -> None:
        context = settings.context
        self.settings, self.device = settings, device
        self.tokenizer = (
            train_tokenizer(documents, vocab_size=settings.vocab_size, context=context)
            if state is None
            else wrap_tokenizer(state["tokenizer"], context=context)
        )
        self.examples = encode_documents(documents, self.tokenizer, context=context)
        self.model = build_language_model(settings, self.tokenizer).to(device)  # type: ignore[arg-type]
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=(0.9, 0.95),
        )
        self.step = 0
        # On the device: to ask for a loss in every step would make a GPU wait.
        self.losses = torch.zeros(settings.steps, device=device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            self.losses.copy_(state["losses"])

    def fit(self, checkpoint: Path, record: dict[str, Any], *, save_every: int) -> None:
        """Do the steps that are left; `record` goes into the checkpoints."""
        steps = self.settings.steps
        interval = max(1, steps // _NUM_REPORTS)
        if self.step:
            logger.info("%s: goes on after step %d", checkpoint.parent, self.step)
        logger.info("%d parameters, %d examples", self.model.num_parameters(), len(self.examples))
        self.model.train()
        started, num_tokens = perf_counter(), 0
        while self.step < steps:
            num_tokens += self._train_step()
            if self.step % interval == 0 or self.step == steps:
                loss = self.losses[max(0, self.step - interval) : self.step].mean()
                pace = num_tokens / (perf_counter() - started)
                logger.info("step %d/%d: loss %.4f, %.0f tokens/s", self.step, steps, loss, pace)
            if self.step % save_every == 0 or self.step == steps:
                self._save(checkpoint, record)

    def _train_step(self) -> int:
        settings = self.settings
        examples = examples_of_step(
            self.examples,
            self.step,
            batch_size=settings.batch_size,
            wordings=settings.wordings,
            word_dropout=settings.word_dropout,
            seed=settings.seed,
        )
        batch = self._batch(examples)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(self.step, settings.steps)
        loss = self._token_losses(batch).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses[self.step] = loss.detach()
        self.step += 1
        return sum(len(example.ending) + sum(map(len, example.beginnings)) - 1 for example in examples)

    def _batch(self, examples: Sequence[Example]) -> LanguageBatch:
        assert isinstance(self.tokenizer.pad_token_id, int)
        return make_batch(examples, pad_token_id=self.tokenizer.pad_token_id, device=self.device)

    def _token_losses(self, batch: LanguageBatch) -> Tensor:
        """Of the tokens that are predicted, one after another."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            output: Any = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        counted = batch.labels != IGNORED
        return cross_entropy(output.logits[counted].float(), batch.labels[counted], reduction="none")

    def mean_losses(self, steps: int) -> list[tuple[int, float]]:
        """`(step, mean loss since the one before)`, as it was reported."""
        interval = max(1, steps // _NUM_REPORTS)
        return [
            (end, round(float(self.losses[end - interval : end].mean()), 4))
            for end in range(interval, steps + 1, interval)
        ]

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        """Loss and perplexity per token of texts, and of questions in each wording alone."""
        self.model.eval()
        total, count = 0.0, 0
        for start in range(0, len(examples), self.settings.batch_size):
            chosen = examples[start : start + self.settings.batch_size]
            losses = self._token_losses(self._batch([Example(e.beginnings[:1], e.ending) for e in chosen]))
            total, count = total + float(losses.double().sum()), count + len(losses)
        return {"tokens": count, "loss": round(total / count, 4), "perplexity": round(math.exp(total / count), 3)}

    def round_weights(self) -> None:
        """To the number format in which they are written, so that what is measured is what is loaded."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(_DTYPES[self.settings.weights]))

    def write(self, folder: Path) -> None:
        """The folder for transformers, which reads `dtype` of its config and so loads float32 whatever is stored."""
        stored: dict[str, Tensor] = {}
        of_memory: dict[int, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            # Tied weights stay one tensor, which is then written once.
            of_memory.setdefault(tensor.data_ptr(), tensor.to("cpu", _DTYPES[self.settings.weights]))
            stored[name] = of_memory[tensor.data_ptr()]
        self.model.save_pretrained(folder, state_dict=stored)
        self.tokenizer.save_pretrained(folder)

    def _save(self, path: Path, record: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        state = {
            "record": json.dumps(record),
            "step": self.step,
            "losses": self.losses,
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def _open(folder: Path, record: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The record of a finished training of the same kind, or the checkpoint of one that is not finished, or neither."""
    if (folder / RECORD).exists():
        found = json.loads((folder / RECORD).read_text())
        _check_same(folder, found, record)
        return found, None
    if (folder / CHECKPOINT).exists():
        state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
        _check_same(folder, json.loads(state["record"]), record)
        return None, state
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} holds files, but neither {CHECKPOINT} nor {RECORD}; valid: a new or empty folder")
    return None, None


def _check_same(folder: Path, found: dict[str, Any], record: dict[str, Any]) -> None:
    mine, theirs = ({**of, **of["settings"]} for of in (record, found))
    names = [*record["settings"], "data_sha256", "valid_sha256"]
    different = [name for name in names if mine.get(name) != theirs.get(name)]
    if different:
        raise ValueError(f"{folder} holds a training with another {', '.join(different)}; valid: another folder")


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
