"""Small random models of many architectures, saved as Hugging Face checkpoints with a tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from endor.formats import CheckpointReader
from endor.kernels import decode

VOCABULARY = 130
_COMMON = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
_ENCODER = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _DECODER),
    "llama-tied": ("Llama", {**_DECODER, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", _DECODER),
    "qwen3": ("Qwen3", _DECODER),
    "mistral": ("Mistral", _DECODER),
    "gemma": ("Gemma", _DECODER),
    "gemma2": ("Gemma2", {**_DECODER, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi3": ("Phi3", _DECODER),
    "opt": (
        "OPT",
        {
            **_COMMON,
            "hidden_size": 64,
            "ffn_dim": 96,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
    ),
    "gpt-neox": (
        "GPTNeoX",
        {**_COMMON, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64},
    ),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bert": ("Bert", _ENCODER),
    "bert-masked": ("Bert", _ENCODER),
    "roberta": ("Roberta", _ENCODER),
    "mixtral": ("Mixtral", {**_DECODER, "num_local_experts": 4}),
    "bart": (
        "Bart",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
        },
    ),
    "t5": (
        "T5",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
}
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertModel",
    "bert-masked": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "bart": "BartForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
}


def build(family: str, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A random model of a family."""
    prefix, values = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**values, **changes})
    cls = getattr(transformers, _CLASSES.get(family, f"{prefix}ForCausalLM"))
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of ones and biases of zeros would hide mix-ups
                parameter.add_(torch.randn(parameter.shape).to(dtype) * 0.05)
    return model


def save_source(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """A random model of a family as a checkpoint of safetensors files."""
    build(family, dtype=dtype, **changes).save_pretrained(directory, max_shard_size=shard_size)
    save_tokenizer(directory)
    return directory


def save_as_bin(family: str, directory: Path, *, shards: int = 1, legacy: bool = False) -> Path:
    """The same as `pytorch_model*.bin`, one file or several with an index."""
    import json

    model = build(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    save_tokenizer(directory)
    state = dict(model.state_dict())
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return directory
    names = list(state)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name].clone() for name in names[number::shards]}
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of single characters."""
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)


def dense_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an Endor checkpoint, decoded, under its own name and those tied to it."""
    with CheckpointReader(checkpoint) as reader:
        dense = {name: decode(reader.read(name)) for name in reader.names()}
        return dense | {alias: dense[name] for alias, name in reader.aliases.items()}


def file_digests(directory: Path) -> dict[str, bytes]:
    """Contents of all files, to compare two checkpoints byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def rewrite(source: Path, change: Any, target: Path) -> Path:
    """A copy of a single-file checkpoint whose tensors went through `change`, a function of the state
    dict."""
    from safetensors.torch import load_file

    shutil.copytree(source, target)
    state = change(load_file(source / "model.safetensors"))
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def zero_share(weights: Iterable[torch.Tensor]) -> float:
    """Share of zeros among all weights."""
    total = zeros = 0
    for weight in weights:
        total += weight.numel()
        zeros += int((weight == 0).sum())
    return zeros / total
