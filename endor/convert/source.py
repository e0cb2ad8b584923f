"""Source checkpoints: a Hugging Face model directory (or hub id) whose tensors are read one at a time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from endor.convert.weight_files import SourceTensor, WeightFile, open_weight_file
from endor.errors import ConvertError
from endor.formats.reader import CONFIG_NAME, is_endor_checkpoint

__all__ = ["SourceCheckpoint", "resolve_source"]

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_HUB_TIMEOUT_S = 10.0


def resolve_source(source: str | Path) -> Path:
    """The local directory of `source`: itself, or the snapshot of a hub id. Raises ConvertError."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConvertError(f"{path} is a file; SOURCE must be the directory of a Hugging Face model")
    if not _HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
        raise ConvertError(f"{path}: no such directory")
    return _download(str(source))


def _download(repository: str) -> Path:
    """The snapshot of a hub repository: what is new is downloaded; without a network, what the cache has
    is used."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # The HTTP library under huggingface_hub has changed with its releases; its own base error says which it
    # is.
    http_errors: Any = tuple(
        c for c in HfHubHTTPError.__mro__ if c.__name__ in ("HTTPError", "RequestException")
    )
    try:
        try:
            info = HfApi().model_info(repository, timeout=_HUB_TIMEOUT_S)
        except HfHubHTTPError:
            raise
        except (*http_errors, OSError):
            return Path(snapshot_download(repository, local_files_only=True))
        files = [entry.rfilename for entry in info.siblings or ()]
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in files) else "*.bin"
        return Path(snapshot_download(repository, allow_patterns=[*_HUB_FILES, weights]))
    except LocalEntryNotFoundError as error:
        reason = "the hub cannot be reached and the cache does not have it"
        raise _not_a_model(repository, reason) from error
    except (*http_errors, HFValidationError, OSError) as error:
        raise _not_a_model(repository, str(error).strip().partition("\n")[0]) from error


def _not_a_model(repository: str, reason: str) -> ConvertError:
    return ConvertError(
        f"{repository!r} is not a directory, and as a hub id it cannot be downloaded: {reason}. Give the "
        "path of a local model directory, or check the name, your network and your access"
    )


class SourceCheckpoint:
    """An open source checkpoint; a context manager.

    Attributes:
        directory: the model directory.
        config: contents of config.json.
        tensors: every tensor of the weight files by name.
        files: the weight files, in the order of their names.

    Raises:
        ConvertError: there is no model here, it is Endor's or quantized already, or a file is missing or
            damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _read_config(directory)
        weight_map, self._paths = _find_weights(directory)
        self._homes: dict[str, WeightFile] = {}
        with ExitStack() as stack:
            self.files: tuple[WeightFile, ...] = tuple(
                stack.enter_context(open_weight_file(p)) for p in self._paths
            )
            self._locate(weight_map)
            self._close = stack.pop_all()
        self.tensors: Mapping[str, SourceTensor] = {name: f.tensors[name] for name, f in self._homes.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close.close()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def resident_bytes(self) -> int:
        """Memory the open files occupy, tensors read not counted."""
        return sum(file.resident_bytes for file in self.files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, in memory of its own. Raises ConvertError if its file cannot be read."""
        return self._homes[name].read(name)

    def fingerprint(self) -> dict[str, list[int] | str]:
        """What identifies the source without reading it: names, sizes and times of the files, and the
        config."""
        stats = {path.name: path.stat() for path in self._paths}
        files: dict[str, list[int] | str] = {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}
        canonical = json.dumps(self.config, sort_keys=True).encode()
        return {**files, CONFIG_NAME: hashlib.sha256(canonical).hexdigest()}

    def _locate(self, weight_map: Mapping[str, str] | None) -> None:
        """Find the file of every tensor and check that index and files agree."""
        for file in self.files:
            for name in file.tensors:
                if name in self._homes:
                    raise ConvertError(
                        f"{file.path}: tensor {name!r} is also in {self._homes[name].path.name}"
                    )
                self._homes[name] = file
        if not self._homes:
            raise ConvertError(f"{self.directory}: the weight files hold no tensors")
        for name, shard in (weight_map or {}).items():
            if name not in self._homes or self._homes[name].path.name != shard:
                raise ConvertError(
                    f"{self.directory / shard} does not have tensor {name!r}, which the index says it has. "
                    "The download may be incomplete: fetch the model again"
                )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.exists():
        what = "it is empty" if not any(directory.iterdir()) else f"it has no {CONFIG_NAME}"
        raise ConvertError(f"{directory} is not a Hugging Face model directory: {what}")
    config = _read_json(path)
    if is_endor_checkpoint(directory):
        raise ConvertError(f"{directory} is an Endor checkpoint already; convert the original model instead")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConvertError(
            f"{directory} is quantized already (quantization_config.quant_method is {method!r}); convert the "
            "unquantized model instead"
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_bytes())
    except OSError as error:
        raise ConvertError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConvertError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(loaded, dict):
        raise ConvertError(f"{path}: expected a JSON object, found {type(loaded).__name__}")
    return loaded


def _find_weights(directory: Path) -> tuple[dict[str, str] | None, tuple[Path, ...]]:
    """The index, if there is one, and the weight files; safetensors before .bin, as transformers chooses."""
    for name in _SINGLE:
        if (directory / name).is_file():
            return None, (directory / name,)
        index = directory / f"{name}.index.json"
        if index.is_file():
            weight_map = _read_weight_map(index)
            return weight_map, tuple(_shards(index, weight_map))
    others = sorted(
        p.name for p in directory.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    )
    found = (
        f"; it has {', '.join(others[:5])}, which is not a whole model in a layout Endor reads"
        if others
        else ""
    )
    raise ConvertError(
        f"{directory} has a model config without weights: expected model.safetensors, pytorch_model.bin or "
        f"one of their .index.json{found}"
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index}: expected a weight_map of tensor names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name:
            raise ConvertError(
                f"{index}: tensor {name!r} is said to be in {shard!r}, which is not a file name"
            )
    return weight_map


def _shards(index: Path, weight_map: Mapping[str, str]) -> Iterator[Path]:
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not path.is_file():
            name = next(n for n, s in weight_map.items() if s == shard)
            raise ConvertError(
                f"{path} is missing, but {index.name} says that it has tensor {name!r}. The download may be "
                "incomplete: fetch the model again"
            )
        yield path
