"""Sections of codec `exponent` that contradict each other, or params that cannot be, are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from endor.errors import FormatError
from endor.formats import PackedTensor, TensorLayout
from endor.formats.codecs.exponent import SLACK_BYTES
from endor.kernels import backends, decode, decode_rows, encode
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import replace_section

Sections = dict[str, torch.Tensor]


def packed(dtype: torch.dtype = torch.bfloat16, mask: str = "bitmap") -> PackedTensor:
    """[80, 300], five row blocks of 16 rows: few exponents, and some rare ones."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(80, 300, generator=generator)
    weight[weight.abs() < 0.6] = 0
    weight[::7, ::11] *= 2.0**-9
    return encode(weight.to(dtype), values="exponent", mask=mask, backend="reference")


def first_plane(sections: Mapping[str, torch.Tensor], block: int) -> slice:
    """The bytes of the first plane of a row block."""
    count = int(sections["row_offsets"][block : block + 2].diff())
    begin = int(sections["exponent_offsets"][block]) + table_bytes(packed())
    return slice(begin, begin + -(-count // 8))


@dataclass(frozen=True)
class Lie:
    id: str
    rule: str
    change: Callable[[Sections], object]
    words: str
    dtype: torch.dtype = torch.bfloat16
    decoders_tell: bool = True


def set_offset(at: int, value: int) -> Callable[[Sections], object]:
    return lambda sections: sections["exponent_offsets"].__setitem__(at, value)


def move_offset(at: int, by: int) -> Callable[[Sections], object]:
    return lambda sections: sections["exponent_offsets"][at].add_(by)


def send_on_more(sections: Sections) -> None:
    plane = first_plane(sections, 0)
    sections["exponents"][plane.start : plane.stop - 1] = 0xFF


def set_padding_of_first_plane(sections: Sections) -> None:
    assert int(sections["row_offsets"][1:3].diff()) % 8
    sections["exponents"][first_plane(sections, 1).stop - 1] |= 0x80


def fill(sections: Sections) -> None:
    sections["exponents"][:-SLACK_BYTES] = 0xFF


def table_bytes(tensor: PackedTensor) -> int:
    params = tensor.layout.params
    return 3 * params["pairs"] + params["singles"]


USED = packed().layout.params["exponent_bytes"]
LIES = [
    Lie("offsets-start-late", "F26", set_offset(0, 1), "from 0 to exponent_bytes"),
    Lie("offsets-stop-early", "F26", set_offset(-1, USED - 1), "from 0 to exponent_bytes"),
    Lie("offsets-reach-into-the-slack", "F26", set_offset(-1, USED + 1), "from 0 to exponent_bytes"),
    Lie("offset-is-negative", "F26", set_offset(2, -1), "row block 1: exponent_offsets decrease"),
    Lie("offset-is-huge", "F26", set_offset(2, 2**31 - 1), "row block 1: exponent_offsets decrease or leave"),
    Lie("record-too-short", "F27", move_offset(1, -1), "row block [01]: "),
    Lie("record-too-long", "F27", move_offset(1, 1), "row block [01]: "),
    Lie("record-empty", "F27", set_offset(1, 0), "row block 0: its levels are longer than the record"),
    Lie("more-values-go-on", "F27", send_on_more, "row block 0: its levels are longer than"),
    Lie("all-values-go-on", "F27", fill, "row block [01]: "),
    Lie(
        "bit-behind-the-last", "F27", set_padding_of_first_plane, "row block 1: bits are set behind the last"
    ),
    Lie(
        "slack-not-zero",
        "F26",
        lambda sections: sections["exponents"][-1:].fill_(1),
        "behind the last record are not zero",
        decoders_tell=False,
    ),
    Lie(
        "fp16-exponent-32",
        "F28",
        lambda sections: sections["exponents"][:1].fill_(32),
        "one is not below 32",
        torch.float16,
        decoders_tell=False,
    ),
    Lie(
        "fp16-mantissa-padding",
        "F28",
        lambda sections: sections["mantissa_low"][-1:].fill_(0xFF),
        "mantissa_low: the bits behind the last value are not zero",
        torch.float16,
        decoders_tell=False,
    ),
]


def lied(lie: Lie) -> PackedTensor:
    honest = packed(lie.dtype)
    honest.check()
    sections = {name: section.clone() for name, section in honest.sections.items()}
    lie.change(sections)
    return replace_section(honest, sections)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.id)
def test_check_names_the_rule_and_the_row_block(lie: Lie) -> None:
    with pytest.raises(FormatError, match=lie.words) as caught:
        lied(lie).check()
    assert f"[{lie.rule}]" in str(caught.value)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("lie", [lie for lie in LIES if lie.decoders_tell], ids=lambda lie: lie.id)
def test_decoders_refuse_what_would_lead_them_outside(lie: Lie, backend: str) -> None:
    if not supported(backend):
        pytest.skip(f"{backend} does not have codec exponent")
    with pytest.raises(FormatError):
        decode(lied(lie), backend=backend)


def supported(backend: str) -> bool:
    from endor.kernels.registry import _BACKENDS

    return _BACKENDS[backend].supports("exponent", torch.device("cpu"))


def test_a_lie_elsewhere_does_not_stop_other_row_blocks() -> None:
    honest = packed()
    wrong = replace_section(honest, {"exponents": honest.sections["exponents"].clone()})
    send_on_more(dict(wrong.sections))
    rows = slice(16, 48)
    out = torch.empty(32, 300, dtype=torch.bfloat16)
    decode_rows(wrong, 1, 3, out, backend="reference")
    assert torch.equal(out, decode(honest, backend="reference")[rows])


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"pairs": 0, "singles": 3},
        {"pairs": 0, "singles": 3, "exponent_bytes": USED, "extra": 1},
        {"pairs": 0, "singles": 0, "exponent_bytes": USED},
        {"pairs": 3, "singles": 0, "exponent_bytes": USED},
        {"pairs": 0, "singles": 9, "exponent_bytes": USED},
        {"pairs": 0, "singles": 3, "exponent_bytes": 14},
    ],
    ids=lambda params: "-".join(str(v) for v in params.values()) or "none",
)
def test_params_that_cannot_be_are_refused(params: dict[str, int]) -> None:
    layout = packed().layout
    with pytest.raises(FormatError, match=r"\[F25\]"):
        TensorLayout(layout.shape, layout.dtype, layout.mask, layout.codec, layout.nnz, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match="codec exponent with mask bitmap cannot hold"):
        TensorLayout((4, 4), dtype, "bitmap", "exponent", 4, packed().layout.params)


def test_the_example_of_the_document_decodes_to_its_values() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
    example = document.split("Example of `exponent`")[1].split("\n```\n")[1]
    sections = {
        line.split()[0]: torch.tensor(list(bytes.fromhex(line[18:].split("  ")[0])), dtype=torch.uint8)
        for line in example.splitlines()
        if line and not line.startswith(" ")
    }
    records = sections["exponents"]
    params = {"pairs": 0, "singles": 2, "exponent_bytes": len(records)}
    layout = TensorLayout((1, 9), torch.bfloat16, "bitmap", "exponent", 7, params)
    sections["exponents"] = torch.cat([records, torch.zeros(SLACK_BYTES, dtype=torch.uint8)])
    sections["bitmap"] = sections["bitmap"].view(1, 8)
    for name in ("row_offsets", "exponent_offsets"):
        sections[name] = sections[name].view(torch.int32)
    packed = PackedTensor(layout, sections)
    packed.check()
    expected = torch.tensor([[1.5, 0, 1.0, -1.25, 0, 3.0, 1.75, -0.0, 0.01]]).bfloat16()
    assert_bitwise_equal(decode(packed, backend="reference"), expected)
