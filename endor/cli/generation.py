"""A model, its tokenizer, and one generation with all that is worth knowing about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import click
import torch
import transformers

from endor.cli.options import format_size, say
from endor.errors import LoadError, PlanError
from endor.runtime import RunStats, Runtime, Trace, load, runtime_of

__all__ = ["Generation", "Session", "SessionOptions"]


@dataclass(frozen=True)
class SessionOptions:
    """Options of `run-offloaded` that concern loading and generating."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    device: str
    device_memory: int | None
    host_memory: int | None
    reader: str
    depth: int
    dtype: torch.dtype | None
    matmul: str
    verify: str
    trace: Path | None


@dataclass(frozen=True)
class Generation:
    """What one generation made, took and moved."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    seconds: float
    first_token_seconds: float
    stats: RunStats
    peak_host_bytes: int
    peak_device_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    def to_json(self, runtime: Runtime) -> dict[str, Any]:
        """The object that `run-offloaded --json` prints."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.token_ids),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
            "bytes": self.stats.bytes_by_tier(),
            "time": self.stats.seconds_by_part(),
            "peak_memory": {"host": self.peak_host_bytes, "device": self.peak_device_bytes},
            "placement": runtime.placement.counts(),
            "reader": runtime.reader.name,
            "kernel": runtime.kernel,
        }


class Session:
    """A loaded model and tokenizer; a context manager that ends the streaming.

    Args:
        directory: of the checkpoint.
        options: see there.
        prompt: what will be continued, so that a GPU's memory is planned for as many tokens; None for a
            conversation, whose length nobody knows.
        quiet: no notes.

    Raises LoadError, FormatError or PlanError when the model cannot be loaded.
    """

    def __init__(
        self, directory: Path, options: SessionOptions, *, prompt: str | None = None, quiet: bool
    ) -> None:
        self.options = options
        transformers.utils.logging.set_verbosity_error()
        say(f"loading {directory}", quiet=quiet)
        began = perf_counter()
        self._trace = Trace() if options.trace else None
        if self._trace is not None and options.trace is not None:
            self._trace.save(options.trace)  # a file that cannot be written is found now, not afterwards
        # A missing directory is refused in the words of `load`, and an unusable tokenizer after that.
        tokenizer = self._find_tokenizer(directory)
        self.model = load(
            directory,
            device=options.device,
            device_memory=options.device_memory,
            host_memory=options.host_memory,
            context_length=self._context_length(tokenizer, prompt),
            reader=options.reader,
            depth=options.depth,
            dtype=options.dtype,
            matmul=options.matmul,
            verify=options.verify,
            trace=self._trace,
        )
        self.runtime = runtime_of(self.model)
        if not self.model.can_generate():
            self.runtime.close()
            raise PlanError(
                f"{directory}: a {type(self.model).__name__} makes no text; use endor.load from Python"
            )
        if isinstance(tokenizer, LoadError):
            self.runtime.close()
            raise tokenizer
        self.tokenizer = tokenizer
        say(f"loaded in {perf_counter() - began:.1f} s: {_describe(self.runtime)}", quiet=quiet)

    @staticmethod
    def _find_tokenizer(directory: Path) -> Any:
        """The tokenizer, or the error to raise when the model turns out to be there."""
        if not directory.is_dir():  # transformers would look for it on the hub
            return LoadError(f"{directory}: no such directory")
        try:
            return transformers.AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            found = LoadError(
                f"{directory}: no usable tokenizer ({reason}); copy the source model's tokenizer files there"
            )
            found.__cause__ = error
            return found

    def _context_length(self, tokenizer: Any, prompt: str | None) -> int | None:
        if prompt is None or isinstance(tokenizer, LoadError):
            return None
        return len(tokenizer(prompt)["input_ids"]) + self.options.max_new_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.runtime.close()
        if self._trace is not None and self.options.trace is not None:
            self._trace.save(self.options.trace)

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of a prompt, int64 [1, tokens]."""
        return self._checked(self.tokenizer(text, return_tensors="pt")["input_ids"])

    def encode_chat(self, messages: list[dict[str, str]]) -> torch.Tensor:
        """Token ids of a conversation, by the tokenizer's chat template. Raises PlanError where it has
        none."""
        if not self.tokenizer.chat_template:
            raise PlanError("this model's tokenizer has no chat template; use --prompt instead of --chat")
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return self._checked(encoded["input_ids"])

    def _checked(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 0:
            raise PlanError("the tokenizer makes no token of this prompt; give a longer one")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and ids.shape[1] + self.options.max_new_tokens > limit:
            raise PlanError(
                f"{ids.shape[1]} prompt tokens and --max-new-tokens {self.options.max_new_tokens} are more "
                f"than the {limit} positions of this model; shorten the prompt or ask for fewer"
            )
        return ids.to(self.runtime.device, torch.int64)

    def generate(self, ids: torch.Tensor, *, echo: bool) -> Generation:
        """Continue `ids`, int64 [1, tokens]; with `echo` the text goes to stdout as it is made."""
        torch.manual_seed(self.options.seed)
        before = self.runtime.stats()
        streamer = _Echo(self.tokenizer) if echo else None
        began = perf_counter()
        with torch.inference_mode(), self._first_forward() as first_seconds:
            out = self.model.generate(ids, streamer=streamer, **self._generation_options(ids))
        seconds = perf_counter() - began
        # An encoder-decoder gives only what the decoder made, behind its start token.
        prompt = 1 if self.model.config.is_encoder_decoder else ids.shape[1]
        new = tuple(out[0, prompt:].tolist())
        self.runtime.sample_memory()
        return Generation(
            text=self.tokenizer.decode(new, skip_special_tokens=True),
            token_ids=new,
            prompt_tokens=ids.shape[1],
            seconds=seconds,
            first_token_seconds=first_seconds[0],
            stats=self.runtime.stats() - before,
            peak_host_bytes=self.runtime.peak_anonymous_bytes,
            peak_device_bytes=self.runtime.peak_device_bytes,
        )

    @contextmanager
    def _first_forward(self) -> Iterator[list[float]]:
        """Gives a list that has the seconds of the first forward inside once that is over. The runtime keeps
        the records of the last forwards only."""
        began, seconds = self.runtime.stats().wall_s, list[float]()

        def note(*_: object) -> None:
            if not seconds:
                seconds.append(self.runtime.stats().wall_s - began)

        handle = self.model.register_forward_hook(note)
        try:
            yield seconds
        finally:
            handle.remove()

    def _generation_options(self, ids: torch.Tensor) -> dict[str, Any]:
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": self.options.max_new_tokens,
            "do_sample": self.options.temperature > 0,
        }
        if options["do_sample"]:
            options |= {"temperature": self.options.temperature, "top_p": self.options.top_p, "top_k": 0}
        else:
            options |= {"temperature": None, "top_p": None, "top_k": None}
        if self.tokenizer.pad_token_id is None:
            options["pad_token_id"] = self.tokenizer.eos_token_id
        return options


class _Echo(transformers.TextStreamer):
    """Writes text to stdout as it is made, without the prompt."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        click.echo(text, nl=stream_end)


def _describe(runtime: Runtime) -> str:
    tiers = runtime.placement.counts()
    dense = format_size(runtime.dense_bytes)
    near = f"{tiers['device']} blocks on {runtime.device}, " if runtime.device.type != "cpu" else ""
    text = f"{near}{tiers['host']} blocks in memory, {tiers['disk']} streamed, {dense} dense"
    if runtime.in_parts:
        text += f", {runtime.in_parts}"
    if runtime.streamed_bytes:
        per_token, buffers = format_size(runtime.streamed_bytes), format_size(runtime.ring_bytes)
        text += f" ({per_token} per token, {buffers} of buffers)"
    return text
