"""`run-offloaded`: what it prints, where, with which exit code, and never a traceback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

import endor
from endor.cli.options import SIZE, format_size
from endor.cli.run import command
from endor.kernels.matmul import instruction_sets
from tests.cli.conftest import Run
from tests.support.sources import save_source

PROMPT = "def read_file(path):"
JSON_KEYS = {
    "text",
    "token_ids",
    "prompt_tokens",
    "new_tokens",
    "seconds",
    "tokens_per_second",
    "first_token_seconds",
    "bytes",
    "time",
    "peak_memory",
    "placement",
    "reader",
    "kernel",
}


def test_json_is_one_object_on_stdout_and_its_figures_agree(run_process: Run, demo_checkpoint: Path) -> None:
    done = run_process(
        "run-offloaded",
        demo_checkpoint,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "6",
        "--host-memory",
        "0",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == JSON_KEYS
    assert len(result["token_ids"]) == result["new_tokens"] <= 6
    assert set(result["bytes"]) == {"disk", "host", "device"}
    assert result["bytes"]["disk"] > 0
    assert result["bytes"]["host"] == 0
    assert set(result["time"]) == {"read", "copy", "decode", "compute", "stall"}
    assert set(result["peak_memory"]) == {"host", "device"}
    assert result["placement"]["disk"] > 0
    assert result["tokens_per_second"] == pytest.approx(result["new_tokens"] / result["seconds"])
    assert "loaded in" in done.stderr


def test_the_tokens_are_those_of_the_decoded_dense_model(
    run_command: Run, demo_checkpoint: Path, tmp_path: Path, repository: Path
) -> None:
    with endor.open(demo_checkpoint) as checkpoint:
        state = {name: checkpoint.read_dense(name) for name in checkpoint.names()}
    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(
        repository / "endor" / "assets" / "demo_model"
    )
    dense.load_state_dict(state, strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = dense.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    for host_memory in ("0", "2MB", "1GiB"):
        done = run_command(
            "run-offloaded",
            demo_checkpoint,
            *("--prompt-file", prompt, "--max-new-tokens", "12", "--host-memory", host_memory, "--json"),
            *("--matmul", "decode"),
        )
        assert json.loads(done.stdout)["token_ids"] == expected


@pytest.mark.parametrize("matmul", ["auto", "decode"])
def test_matmul_is_chosen_and_named(run_command: Run, demo_checkpoint: Path, matmul: str) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "2", "--matmul", matmul, "--json")
    done = run_command("run-offloaded", demo_checkpoint, *arguments)
    assert done.returncode == 0, done.stderr
    straight = matmul == "auto" and bool(instruction_sets())
    assert ("(matmul: " in json.loads(done.stdout)["kernel"]) is straight


def test_an_encoder_decoder_makes_what_its_decoder_makes(run_command: Run, tmp_path: Path) -> None:
    source = save_source("t5", tmp_path / "source")
    endor.convert(source, tmp_path / "out", method="none")
    arguments = ("--prompt", "hello", "--max-new-tokens", "4", "--host-memory", "0", "--json")
    done = run_command("run-offloaded", tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    dense: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(source)
    ids = transformers.AutoTokenizer.from_pretrained(source)("hello", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = dense.generate(ids, max_new_tokens=4, do_sample=False)[0, 1:].tolist()
    assert result["prompt_tokens"] == ids.shape[1]
    assert result["token_ids"] == expected
    assert 0 < result["first_token_seconds"] <= result["seconds"]


def test_a_model_that_makes_no_text_is_refused_with_the_way_out(run_command: Run, tmp_path: Path) -> None:
    endor.convert(save_source("bert", tmp_path / "source"), tmp_path / "out", method="none")
    done = run_command("run-offloaded", tmp_path / "out", "--prompt", "hello")
    assert done.returncode == 1
    assert "a BertModel makes no text; use endor.load from Python" in done.stderr


def test_the_prompt_comes_from_stdin_and_quiet_is_quiet(run_process: Run, demo_checkpoint: Path) -> None:
    done = run_process("run-offloaded", demo_checkpoint, "--max-new-tokens", "3", "--quiet", stdin=PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")


def test_stats_go_to_stderr(run_command: Run, demo_checkpoint: Path) -> None:
    done = run_command(
        "run-offloaded", demo_checkpoint, "--prompt", PROMPT, "--max-new-tokens", "3", "--stats"
    )
    for row in (
        "tokens/s",
        "first token",
        "from disk",
        "stall",
        "decode",
        "compute",
        "peak memory",
        "reader",
        "kernel",
        "into host memory kvikio is no faster",
    ):
        assert row in done.stderr
        assert row not in done.stdout


def test_sampling_follows_the_seed(run_command: Run, demo_checkpoint: Path) -> None:
    def sample(seed: int) -> str:
        options = (
            "--temperature",
            "1.0",
            "--top-p",
            "0.95",
            "--seed",
            str(seed),
            "--max-new-tokens",
            "12",
            "--json",
        )
        ids = json.loads(run_command("run-offloaded", demo_checkpoint, "--prompt", PROMPT, *options).stdout)
        return str(ids["token_ids"])

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in (1, 2, 3)}) > 1


def test_chat_without_a_template_says_what_to_do(run_command: Run, demo_checkpoint: Path) -> None:
    done = run_command("run-offloaded", demo_checkpoint, "--chat", stdin="hello\n")
    assert done.returncode == 1
    assert "no chat template; use --prompt" in done.stderr


def test_chat_answers_each_line(run_command: Run, demo_checkpoint: Path, tmp_path: Path) -> None:
    for path in demo_checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    done = run_command("run-offloaded", tmp_path, "--chat", "--max-new-tokens", "2", stdin="one\n\ntwo\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2


def _fails(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "bug in Endor" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_failures_name_the_file_and_exit_with_1(
    run_command: Run, demo_checkpoint: Path, tmp_path: Path
) -> None:
    _fails(
        run_command("run-offloaded", tmp_path / "no", "--prompt", "a"),
        1,
        str(tmp_path / "no"),
        "no such model",
    )
    _fails(run_command("run-offloaded", tmp_path, "--prompt", "a"), 1, str(tmp_path), "config.json")
    _fails(
        run_command("run-offloaded", demo_checkpoint, "--prompt-file", tmp_path / "p"),
        1,
        "cannot read the prompt",
    )
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    _fails(
        run_command("run-offloaded", demo_checkpoint, "--prompt-file", tmp_path / "binary"), 1, "not UTF-8"
    )
    small = run_command("run-offloaded", demo_checkpoint, "--prompt", "a", "--host-memory", "1kB")
    _fails(small, 1, "holds no block", "needs")
    long = run_command("run-offloaded", demo_checkpoint, "--prompt", "a", "--max-new-tokens", "99999")
    _fails(long, 1, "--max-new-tokens 99999", "positions")


def test_a_dense_source_says_to_convert_it(run_command: Run, repository: Path) -> None:
    source = repository / "endor" / "assets" / "demo_model"
    _fails(
        run_command("run-offloaded", source, "--prompt", "a"), 1, "not an Endor checkpoint", "convert-model"
    )


def test_a_model_without_tokenizer_says_so(run_command: Run, demo_checkpoint: Path, tmp_path: Path) -> None:
    for path in demo_checkpoint.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).symlink_to(path)
    _fails(
        run_command("run-offloaded", tmp_path, "--prompt", "a"), 1, "no usable tokenizer", "copy the source"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["M", "--prompt", "a", "--prompt-file", "b"],
        ["M", "--prompt", ""],
        ["M", "--chat", "--prompt", "a"],
        ["M", "--chat", "--json"],
        ["M", "--prompt", "a", "--host-memory", "many"],
        ["M", "--prompt", "a", "--depth", "-1"],
        ["M", "--prompt", "a", "--max-new-tokens", "0"],
        ["M", "--prompt", "a", "--temperature", "-1"],
        ["M", "--prompt", "a", "--top-p", "0"],
        ["M", "--prompt", "a", "--device", "tpu"],
        ["M", "--prompt", "a", "--device", "cuda:one"],
        ["M", "--prompt", "a", "--device-memory", "many"],
        ["M", "--prompt", "a", "--no-such-option"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert "Error:" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused_in_words(demo_checkpoint: Path) -> None:
    result = CliRunner().invoke(command, [str(demo_checkpoint), "--prompt", "a", "--device", "cuda"])
    assert result.exit_code == 1
    assert "there is no CUDA device on this machine" in result.output
    assert "use device cpu" in result.output


def test_device_memory_without_a_device_is_refused_in_words(demo_checkpoint: Path) -> None:
    arguments = [str(demo_checkpoint), "--prompt", "a", "--device", "cpu", "--device-memory", "1MB"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 1
    assert "host_memory" in result.output


def test_ctrl_c_ends_generation_with_130_and_no_traceback(demo_checkpoint: Path, repository: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from endor.cli.run import main; main()", demo_checkpoint),
            *("--prompt", PROMPT, "--max-new-tokens", "490", "--host-memory", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
    )
    assert process.stderr is not None
    while "loaded in" not in (line := process.stderr.readline()):
        assert line, "the process ended before it had loaded the model"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("8GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("1.5 kib", 1536),
        ("2g", 2_000_000_000),
    ],
)
def test_sizes_are_understood(text: str, n_bytes: int) -> None:
    assert SIZE.convert(text, None, None) == n_bytes


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_199_023_256, "2.2 GB"), (123e6, "123 MB")],
)
def test_sizes_are_shown(n_bytes: float, text: str) -> None:
    assert format_size(n_bytes) == text
