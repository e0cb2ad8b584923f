"""Train the small causal LM that ships with Endor, on text that every Python installation has.

The corpus is the source of Python's standard library (code, comments, docstrings) plus the language reference
that `pydoc` carries: about 10 MB of real English and real code under a permissive licence. Three things come
out of it, under `endor/assets/`: a byte-level BPE tokenizer with a four-million-parameter Llama
(`demo_model/`), the default calibration text (`calibration.txt`), and a held-out text of modules that neither
training nor calibration ever saw (`heldout.txt`).

A random model would be enough to test bits; it is not enough to test pruning, where the question is how much
worse a *trained* model gets. The schedule follows whichever of `--steps` and `--minutes` runs out first, so
only a run that ends by its steps is reproducible.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "endor" / "assets"
END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 2048
WINDOW_TOKENS = 256

# Test suites are repetitive, codec tables are not text, and the rest is generated or vendored.
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}
SKIPPED_FOLDERS |= {"pydoc_data", "turtledemo", "ensurepip", "__phello__"}
# Chosen by hand: prose and code, small and large, numeric and textual, none a near copy of another module.
HELD_OUT_MODULES = (
    "bisect.py",
    "calendar.py",
    "cmd.py",
    "fractions.py",
    "heapq.py",
    "mailcap.py",
    "sched.py",
    "shlex.py",
    "textwrap.py",
    "wave.py",
)
CALIBRATION_BYTES = 320_000
DOCUMENT_CHARACTERS = 2_000


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The texts, each one module or one reference topic; `held_out` shares no module with `training`."""

    training: list[str]
    topics: list[str]
    held_out: list[str]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the optimiser does; the defaults are the shipped run."""

    steps: int
    minutes: float
    batch_sequences: int
    learning_rate: float
    weight_decay: float
    seed: int
    autocast: bool


def read_corpus() -> Corpus:
    """Read the standard library of this interpreter, in an order that does not depend on the disk."""
    from pydoc_data import topics  # type: ignore[import-not-found, unused-ignore]

    root = Path(sysconfig.get_path("stdlib"))
    training: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            (held_out if str(relative) in HELD_OUT_MODULES else training).append(text)
    reference = [topics.topics[key] for key in sorted(topics.topics)]
    return Corpus(training=training, topics=reference, held_out=held_out)


def paragraphs(texts: list[str]) -> list[str]:
    """Cut texts into paragraphs of about `DOCUMENT_CHARACTERS`, that is, without an empty line inside."""
    documents = []
    for text in texts:
        current: list[str] = []
        for line in text.splitlines():
            if line.strip():
                current.append(line.rstrip())
            elif sum(map(len, current)) >= DOCUMENT_CHARACTERS:
                documents.append("\n".join(current))
                current = []
        if sum(map(len, current)) >= DOCUMENT_CHARACTERS // 4:
            documents.append("\n".join(current))
    return documents


def calibration_text(corpus: Corpus) -> str:
    """Half prose (the language reference), half code, drawn by the hash of each document: a stable draw."""

    def draw(texts: list[str], budget_bytes: int) -> list[str]:
        drawn, used_bytes = [], 0
        for document in sorted(paragraphs(texts), key=lambda item: hashlib.sha256(item.encode()).digest()):
            size_bytes = len(document.encode()) + 2
            # One huge table must not be a tenth of the calibration.
            if size_bytes > 3 * DOCUMENT_CHARACTERS or used_bytes + size_bytes > budget_bytes:
                continue
            drawn.append(document)
            used_bytes += size_bytes
        return drawn

    prose = draw(corpus.topics, CALIBRATION_BYTES // 2)
    code = draw(corpus.training, CALIBRATION_BYTES // 2)
    mixed = sorted(prose + code, key=lambda item: hashlib.sha256(item.encode()).digest())
    return "\n\n".join(mixed) + "\n"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte sequence has an encoding, so no prompt is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=2 * WINDOW_TOKENS,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Six narrow layers rather than three wide ones: more blocks to stream, most weights prunable."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2 * WINDOW_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one run of token ids, an end-of-text token after each."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(0)
    return torch.tensor(ids, dtype=torch.long)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood over consecutive windows of `WINDOW_TOKENS`, in float32."""
    model.eval()
    whole = tokens[: tokens.numel() // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)
    total, count = 0.0, 0
    for windows in whole.split(16):
        logits = model(input_ids=windows).logits[:, :-1].float()
        total += float(cross_entropy(logits, windows[:, 1:], reduction="sum"))
        count += windows[:, 1:].numel()
    return math.exp(total / count)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def ngram_perplexities(training: torch.Tensor, held_out: torch.Tensor) -> tuple[float, float]:
    """Unigram and smoothed bigram models of the same corpus: what the network must beat."""
    unigram = (torch.bincount(training, minlength=VOCABULARY_SIZE) + 1).double()
    unigram /= unigram.sum()
    pairs = training[:-1] * VOCABULARY_SIZE + training[1:]
    bigram = torch.bincount(pairs, minlength=VOCABULARY_SIZE**2).double().view(VOCABULARY_SIZE, -1)
    previous, following = held_out[:-1], held_out[1:]
    # Dirichlet smoothing towards the unigram, with the weight of 200 observations.
    smoothed = bigram[previous, following] + 200 * unigram[following]
    smoothed /= bigram.sum(1)[previous] + 200
    return math.exp(-float(unigram[following].log().mean())), math.exp(-float(smoothed.log().mean()))


def optimiser_for(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def learning_rate_at(progress: float, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to 2 % of the peak."""
    if progress < 0.03:
        return peak * (0.02 + progress / 0.03)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, recipe: Recipe) -> int:
    """Run the schedule to its end and return the number of steps taken."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimiser = optimiser_for(model, recipe)
    offsets = torch.arange(WINDOW_TOKENS + 1)
    started_s, step, progress, smoothed_loss = time.monotonic(), 0, 0.0, math.log(VOCABULARY_SIZE)
    model.train()
    while progress < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(progress, recipe.learning_rate)
        shape = (recipe.batch_sequences, 1)
        starts = torch.randint(tokens.numel() - WINDOW_TOKENS, shape, generator=generator)
        windows = tokens[starts + offsets]
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float(), windows[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        elapsed_s = time.monotonic() - started_s
        progress = max(step / recipe.steps, elapsed_s / (60 * recipe.minutes))
        smoothed_loss += 0.05 * (loss.item() - smoothed_loss)
        if step % 50 == 0:
            rate = step * recipe.batch_sequences * WINDOW_TOKENS / elapsed_s
            report(f"step {step}  {progress:6.1%}  loss {smoothed_loss:.3f}  {rate:,.0f} tokens/s")
        if step % 500 == 0:
            excerpt = held_out[: 64 * WINDOW_TOKENS]
            report(f"step {step}  held-out perplexity {perplexity(model, excerpt):.2f} (excerpt)")
            model.train()
    return step


def report(line: str) -> None:
    print(line, flush=True)


def write_texts(corpus: Corpus, folder: Path) -> None:
    """Calibration and held-out text, and the licence they stand under."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.txt").write_text(calibration_text(corpus), encoding="utf-8")
    (folder / "heldout.txt").write_text("\n\n".join(paragraphs(corpus.held_out)) + "\n", encoding="utf-8")
    shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", folder / "LICENSE-PSF.txt")


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The checkpoint in bf16, as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.nn.Module.to(model, torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """The model card: where the text came from, how it was trained, what was measured."""
    measured = json.dumps(figures, indent=2)
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
language: en
---

# Endor's demonstration model

A causal language model of {figures["parameters"]:,} parameters (Llama architecture, bf16) that writes
something like Python. It exists so that demo and tests can prune, pack and stream a *trained* model; it is of
no other use.

- **Data**: the source of Python {figures["python"]}'s standard library and the language reference inside
  `pydoc`, without test suites, codec tables, IDLE and lib2to3. Copyright Python Software Foundation, PSF
  License Version 2 (`../LICENSE-PSF.txt`). The modules of `../heldout.txt` are in neither the training nor
  the calibration text.
- **Weights and tokenizer**: Apache-2.0, as the rest of Endor.
- **Command**: `{figures["command"]}`
- **Measured** (perplexity on `../heldout.txt`, windows of {WINDOW_TOKENS} tokens, float32 arithmetic):

```json
{measured}
```
""",
        encoding="utf-8",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write (default: endor/assets)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="compress the schedule to this")
    parser.add_argument("--batch-sequences", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action="store_true", help="bf16 arithmetic, for CPUs with bf16 units")
    parser.add_argument("--texts-only", action="store_true", help="write the two texts and stop")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    corpus = read_corpus()
    write_texts(corpus, arguments.out)
    if arguments.texts_only:
        return
    recipe = Recipe(
        steps=arguments.steps,
        minutes=arguments.minutes,
        batch_sequences=arguments.batch_sequences,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        seed=arguments.seed,
        autocast=arguments.autocast,
    )
    texts = corpus.training + corpus.topics
    tokenizer = train_tokenizer(texts)
    # Paragraphs as well as whole modules: the calibration and held-out texts come without empty lines.
    tokens = token_stream(tokenizer, texts + paragraphs(texts))
    held_out = token_stream(tokenizer, [(arguments.out / "heldout.txt").read_text(encoding="utf-8")])
    unigram, bigram = ngram_perplexities(tokens, held_out)
    model = build_model(recipe.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report(f"{tokens.numel():,} training tokens, {held_out.numel():,} held out, {parameters:,} parameters")
    report(f"held-out perplexity: unigram {unigram:.1f}, bigram {bigram:.1f}")
    started_s = time.monotonic()
    steps = train(model, tokens, held_out, recipe)
    minutes = (time.monotonic() - started_s) / 60
    folder = arguments.out / "demo_model"
    write_model(model, tokenizer, folder)
    figures = {
        "parameters": parameters,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join(["python", "scripts/train_demo_model.py", *sys.argv[1:]]),
        "steps": steps,
        "tokens_seen": steps * recipe.batch_sequences * WINDOW_TOKENS,
        "minutes": round(minutes, 1),
        "perplexity_unigram": round(unigram, 2),
        "perplexity_bigram": round(bigram, 2),
        "perplexity": round(perplexity(model.float(), held_out), 3),
    }
    write_card(folder, figures)
    report(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
