"""The functions that stand for accelerate's: same results, same traces, and none of the traps."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import accelerate.big_modeling
import accelerate.hooks
import accelerate.utils.modeling
import accelerate.utils.offload
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import endor
from endor.errors import FormatError, KernelError, LoadError, PlanError
from endor.integrations import accelerate as ours
from endor.integrations.accelerate.hooks import align_hooks
from endor.runtime.filemap import MappedFile
from tests.support.offload import Peeking, Stack, Tied, locations, run, sample, save, stack, stream_of

HOMES = (
    accelerate.big_modeling,
    accelerate.hooks,
    accelerate.utils.modeling,
    accelerate.utils.offload,
)


def offload_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return ours.disk_offload(model, folder)


def offload_to_host(model: nn.Module, folder: Path) -> nn.Module:
    return ours.cpu_offload(model)


def dispatch_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return ours.dispatch_model(model, {"": "disk"}, offload_dir=folder)


OFFLOADERS = [offload_to_disk, offload_to_host, dispatch_to_disk]
Offloader = Callable[[nn.Module, Path], nn.Module]


@pytest.fixture(params=["mapped", "ring"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways from file to weight: as if the page cache had everything, and as if it had nothing."""
    cached = 1.0 if request.param == "mapped" else 0.0
    monkeypatch.setattr(MappedFile, "cached_fraction", lambda *_: cached)
    return str(request.param)


# The interface.


@pytest.mark.parametrize(
    "name", sorted(set(ours.__all__) - {"install", "Installation", "offload_stats", "OffloadStats"})
)
def test_signatures_are_those_of_accelerate(name: str) -> None:
    theirs = next(vars(home)[name] for home in HOMES if name in vars(home))
    mine = getattr(ours, name)
    expected = inspect.signature(theirs).parameters
    found = inspect.signature(mine).parameters
    assert list(found)[: len(expected)] == list(expected)
    assert {k: p.default for k, p in expected.items()} == {k: found[k].default for k in expected}
    more = [parameter for key, parameter in found.items() if key not in expected]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in more)


@pytest.mark.parametrize(
    "name",
    [
        "cpu_offload",
        "cpu_offload_with_hook",
        "disk_offload",
        "dispatch_model",
        "infer_auto_device_map",
        "init_empty_weights",
        "load_checkpoint_and_dispatch",
    ],
)
def test_the_top_of_the_package_has_it(name: str) -> None:
    assert getattr(endor, name) is getattr(ours, name)
    assert name in dir(endor)


@pytest.mark.parametrize("offload", OFFLOADERS)
def test_results_are_those_of_the_model(offload: Offloader, tmp_path: Path, each_way: str) -> None:
    model = stack()
    expected = run(model, sample())
    assert offload(model, tmp_path) is model
    for _ in range(3):
        assert torch.equal(run(model, sample()), expected)
    assert set(locations(model).values()) == {"meta"}


def test_traces_of_disk_offload_are_those_of_accelerate(tmp_path: Path) -> None:
    mine, theirs = stack(), stack()
    ours.disk_offload(mine, tmp_path / "mine")
    accelerate.disk_offload(theirs, tmp_path / "theirs")
    hooked = {name for name, module in theirs.named_modules() if hasattr(module, "_hf_hook")}
    assert {name for name, module in mine.named_modules() if hasattr(module, "_hf_hook")} == hooked
    for name in hooked:
        module: Any = mine.get_submodule(name)
        other: Any = theirs.get_submodule(name)
        hook = module._hf_hook
        assert isinstance(hook, accelerate.hooks.AlignDevicesHook)
        assert hook.io_same_device == other._hf_hook.io_same_device
        assert hasattr(module, "_old_forward")
        assert module.forward.__name__ == "forward"
    weights: list[Any] = [model.get_submodule("layers.0")._hf_hook for model in (mine, theirs)]
    assert torch.equal(weights[0].weights_map["weight"], weights[1].weights_map["weight"])
    assert not hasattr(mine, "hf_device_map")


def test_accelerate_reads_the_folder_that_was_written(tmp_path: Path) -> None:
    model = stack()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours.disk_offload(model, tmp_path)
    weights = accelerate.utils.OffloadedWeightsLoader(save_folder=tmp_path)
    assert {name: torch.equal(weights[name], tensor) for name, tensor in expected.items()} == dict.fromkeys(
        expected, True
    )


def test_dispatch_model_leaves_its_map_and_guards_moves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = stack()
    device_map = {"layers": "disk", "norm": "cpu"}
    ours.dispatch_model(model, device_map, offload_dir=tmp_path)
    assert model.hf_device_map == device_map
    assert "meta" in caplog.text
    with pytest.raises(RuntimeError, match="can't move a model"):
        model.to("cpu")
    with pytest.raises(RuntimeError, match="can't move a model"):
        model.cuda()
    ours.remove_hook_from_submodules(model)
    assert not {"to", "cuda", "forward", "_hf_hook", "_old_forward"} & vars(model).keys()


def test_one_device_needs_no_hooks() -> None:
    model = ours.dispatch_model(stack(), {"": "cpu"})
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert model.hf_device_map == {"": "cpu"}


@pytest.mark.parametrize("offload", OFFLOADERS)
def test_removing_the_hooks_leaves_no_trace(offload: Offloader, tmp_path: Path) -> None:
    model, untouched = stack(), stack()
    offload(model, tmp_path)
    run(model, sample())
    ours.remove_hook_from_submodules(model)
    for module, other in zip(model.modules(), untouched.modules(), strict=True):
        assert vars(module).keys() - {"hf_device_map"} == vars(other).keys()
    for name, tensor in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


# Defects of accelerate that must not be here.


def test_another_models_folder_is_not_reused(tmp_path: Path, each_way: str) -> None:
    first, second = stack(seed=1), stack(seed=2)
    expected = [run(first, sample()), run(second, sample())]
    ours.disk_offload(first, tmp_path)
    ours.disk_offload(second, tmp_path)
    assert torch.equal(run(second, sample()), expected[1])
    assert torch.equal(run(first, sample()), expected[0])


def test_the_same_models_folder_is_reused(tmp_path: Path) -> None:
    ours.disk_offload(stack(), tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    ours.disk_offload(stack(), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == written
    assert len(written) == 1


def test_a_folder_that_accelerate_left_is_not_trusted(tmp_path: Path) -> None:
    accelerate.disk_offload(stack(seed=1), tmp_path)
    index = (tmp_path / "index.json").read_bytes()
    model = stack(seed=2)
    expected = run(model, sample())
    ours.disk_offload(model, tmp_path)
    assert torch.equal(run(model, sample()), expected)
    assert (tmp_path / "index.json").read_bytes() == index


def test_a_model_on_meta_takes_the_weights_that_accelerate_left(tmp_path: Path) -> None:
    expected = run(stack(), sample())
    accelerate.disk_offload(stack(), tmp_path)
    with ours.init_empty_weights():
        model = Stack().eval()
    ours.disk_offload(model, tmp_path)
    assert torch.equal(run(model, sample()), expected)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    accelerate.disk_offload(stack(), tmp_path)
    with ours.init_empty_weights():
        model = Stack(width=128)
    with pytest.raises(PlanError, match=r"weight 'layers\.\d\.\w+' has shape .* another offload folder"):
        ours.disk_offload(model, tmp_path)


def test_weights_that_are_nowhere_are_an_error(tmp_path: Path) -> None:
    with ours.init_empty_weights():
        model = Stack()
    with pytest.raises(PlanError, match="neither in memory nor in the offload folder"):
        ours.disk_offload(model, tmp_path)


USES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": F.linear,
    "matmul": lambda x, weight: x @ weight.t(),
    "transposed": lambda x, weight: x @ weight.mT,
    "data": lambda x, weight: x @ weight.data,
    "conv1d": lambda x, weight: F.conv1d(x[None], weight[:, :3, None]),
    "einsum": lambda x, weight: torch.einsum("rc,oc->ro", x, weight),
    "bmm": lambda x, weight: torch.bmm(x[None], weight[None]),
    "index": lambda x, weight: x * weight[0],
    "embedding": lambda x, weight: F.embedding(x.long(), weight),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("offload", OFFLOADERS)
def test_a_weight_used_while_it_is_not_there_raises(offload: Offloader, use: str, tmp_path: Path) -> None:
    model = offload(Peeking(USES[use]), tmp_path)
    x = sample(rows=3)
    with pytest.raises(KernelError, match=r"'inner\.weight' is offloaded .* preload_module_classes"):
        run(model, x)


def test_preloaded_classes_may_use_their_childrens_weights(tmp_path: Path, each_way: str) -> None:
    model = Peeking(F.linear)
    expected = run(model, sample())
    ours.disk_offload(model, tmp_path, preload_module_classes=["Peeking"])
    assert torch.equal(run(model, sample()), expected)


@pytest.mark.parametrize("offload", OFFLOADERS)
def test_threads_that_share_a_model_get_the_right_results(
    offload: Offloader, tmp_path: Path, each_way: str
) -> None:
    model = stack()
    inputs = [sample(seed) for seed in range(4)]
    expected = [run(model, x) for x in inputs]
    offload(model, tmp_path)
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            wrong.extend(
                number for _ in range(10) if not torch.equal(run(model, inputs[number]), expected[number])
            )
        except Exception as error:  # noqa: BLE001 - what a thread raises must not be lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Failing(nn.Linear):
    """Fails inside its own forward, once it has its weight."""

    error: BaseException | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        assert self.weight.device.type == "cpu"
        if self.error is not None:
            raise self.error
        return super().forward(input)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("offload", OFFLOADERS)
def test_a_forward_that_fails_leaves_nothing_loaded(
    offload: Offloader, error: BaseException, tmp_path: Path, each_way: str
) -> None:
    model = stack()
    failing = Failing(256, 256)
    model.layers[2] = failing
    expected = run(model, sample())
    offload(model, tmp_path)
    failing.error = error
    with pytest.raises(type(error)):
        run(model, sample())
    assert set(locations(model).values()) == {"meta"}
    failing.error = None
    assert torch.equal(run(model, sample()), expected)


@pytest.mark.parametrize("offload", OFFLOADERS)
def test_an_offloaded_model_can_be_copied(offload: Offloader, tmp_path: Path, each_way: str) -> None:
    model = stack()
    expected = run(model, sample())
    offload(model, tmp_path)
    run(model, sample())
    twin = copy.deepcopy(model)
    assert twin.layers[0].forward is not model.layers[0].forward
    del model
    gc.collect()
    assert torch.equal(run(twin, sample()), expected)
    assert set(locations(twin).values()) == {"meta"}


@pytest.mark.parametrize("offload", OFFLOADERS)
def test_an_offloaded_model_can_be_pickled(offload: Offloader, tmp_path: Path, each_way: str) -> None:
    model = stack()
    expected = run(model, sample())
    offload(model, tmp_path)
    run(model, sample())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin, sample()), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), sample()), expected)


@pytest.mark.parametrize("keys", [[""], ["layers", "norm"]], ids=["root", "all parts"])
def test_everything_may_be_on_disk(keys: list[str], tmp_path: Path, each_way: str) -> None:
    model = stack()
    expected = run(model, sample())
    directory = save(model, tmp_path / "model", shards=3)
    device_map = dict.fromkeys(keys, "disk")
    with ours.init_empty_weights():
        empty = Stack().eval()
    ours.load_checkpoint_and_dispatch(empty, directory, device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(run(empty, sample()), expected)
    ours.dispatch_model(model, device_map, offload_dir=tmp_path / "other")
    assert torch.equal(run(model, sample()), expected)


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"": "disk"}], ids=["none", "cpu", "disk"])
def test_strict_names_everything_that_does_not_fit(device_map: dict[str, Any] | None, tmp_path: Path) -> None:
    state = dict(stack().state_dict())
    del state["layers.1.weight"], state["norm.bias"]
    state["extra.weight"] = torch.zeros(2)
    model = stack()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"2 missing \(layers.1.weight, norm.bias\); 1 unexpected \(extra.weight\)"
    ):
        ours.load_checkpoint_in_model(
            model, tmp_path, device_map=device_map, offload_folder=tmp_path / "offload", strict=True
        )
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_tied_weight_needs_to_be_in_the_checkpoint_once(tmp_path: Path) -> None:
    model = Tied()
    state = dict(model.state_dict())
    del state["last.weight"]
    torch.save(state, tmp_path / "model.bin")
    other = Tied()
    ours.load_checkpoint_in_model(other, tmp_path / "model.bin", strict=True)
    assert torch.equal(other.last.weight, model.first.weight)
    assert other.last.weight is other.first.weight


def test_a_tied_weight_left_on_disk_is_found_under_both_names(tmp_path: Path) -> None:
    model = Tied()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "last.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = Tied()
    ours.load_checkpoint_and_dispatch(other, tmp_path, {"": "disk"}, offload_folder=tmp_path / "offload")
    assert torch.equal(run(other, sample()), run(model, sample()))
    left = accelerate.utils.OffloadedWeightsLoader(save_folder=tmp_path / "offload")
    assert torch.equal(left["last.weight"], model.first.weight)


def test_loading_without_a_map_fills_the_parameters_there_are(tmp_path: Path) -> None:
    model = stack(seed=2)
    parameters = list(model.parameters())
    ours.load_checkpoint_in_model(model, save(stack(seed=1), tmp_path))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(run(model, sample()), run(stack(seed=1), sample()))


def test_buffers_of_parts_on_disk_are_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(256), nn.Linear(256, 256)).eval()
    model.get_buffer("0.running_mean").add_(3)
    directory = save(model, tmp_path / "model")
    other = nn.Sequential(nn.BatchNorm1d(256), nn.Linear(256, 256)).eval()
    ours.load_checkpoint_and_dispatch(other, directory, {"": "disk"}, offload_folder=tmp_path / "offload")
    assert torch.equal(run(other, sample()), run(model, sample()))


# Packed weights.


@pytest.mark.parametrize("offload", OFFLOADERS)
def test_packed_weights_are_dispatched_packed(offload: Offloader, tmp_path: Path, each_way: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(512, 512, dtype=torch.bfloat16) for _ in range(3)]
    model = nn.Sequential(*layers).eval()
    for layer in layers:
        weight = layer.weight.detach()
        weight[torch.rand(weight.shape) < 0.5] = 0
        layer.weight = nn.Parameter(endor.encode(weight), requires_grad=False)
    x = sample(width=512).to(torch.bfloat16)
    expected = run(model, x)
    offload(model, tmp_path)
    for _ in range(2):
        assert torch.equal(run(model, x), expected)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 0.6 * 3 * 512 * 512 * 2
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin, x), expected)
    ours.remove_hook_from_submodules(model)
    assert torch.equal(run(model, x), expected)
    assert all(type(layer.weight) is endor.BitmapTensor for layer in layers)


# Ties.


@pytest.mark.parametrize("offload", OFFLOADERS)
def test_tied_weights_stay_tied(offload: Offloader, tmp_path: Path, each_way: str) -> None:
    model = Tied()
    expected = run(model, sample())
    offload(model, tmp_path)
    assert model.first.weight is model.last.weight
    assert torch.equal(run(model, sample()), expected)
    ours.remove_hook_from_submodules(model)
    assert model.first.weight is model.last.weight
    assert torch.equal(run(model, sample()), expected)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = Tied()
    ours.disk_offload(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    assert path.stat().st_size < 2.5 * model.first.weight.nbytes


# Again, and elsewhere.


@pytest.mark.parametrize("second", OFFLOADERS)
@pytest.mark.parametrize("first", OFFLOADERS)
def test_an_offloaded_model_can_be_offloaded_again(
    first: Offloader, second: Offloader, tmp_path: Path, each_way: str
) -> None:
    model = stack()
    expected = run(model, sample())
    first(model, tmp_path / "a")
    second(model, tmp_path / "b")
    assert torch.equal(run(model, sample()), expected)


def test_submodules_may_be_called_on_their_own(tmp_path: Path, each_way: str) -> None:
    model = stack()
    expected = run(model.layers[1], sample())
    ours.disk_offload(model, tmp_path)
    assert torch.equal(run(model.layers[1], sample()), expected)
    assert model.layers[1].weight.device.type == "meta"


def test_gradients_reach_the_inputs_of_an_offloaded_model(tmp_path: Path, each_way: str) -> None:
    model = stack()
    x = sample().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    expected = x.grad.clone()
    ours.disk_offload(model, tmp_path)
    for _ in range(2):
        x.grad.zero_()
        model(x).sum().backward()
        assert torch.equal(x.grad, expected)


class Giving(nn.Module):
    """Gives a view of its weight, as position embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 256))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.weight[: len(x)], {"all": self.weight}


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = Giving()
        self.layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, others = self.positions(x)
        total: torch.Tensor = self.layers(x) + first + others["all"].sum()
        return total


def test_views_of_weights_survive_the_module_that_gave_them(tmp_path: Path, each_way: str) -> None:
    torch.manual_seed(0)
    model = Positions()
    expected = run(model, sample())
    ours.disk_offload(model, tmp_path)
    for _ in range(3):
        assert torch.equal(run(model, sample()), expected)
    assert stream_of(model).mode == each_way


def test_a_removed_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = stack()
    ours.disk_offload(model, tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(LoadError, match=r"endor-.*safetensors"):
        run(model, sample())


def test_a_replaced_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = stack()
    ours.disk_offload(model, tmp_path)
    run(model, sample())
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes())
    with pytest.raises(LoadError, match="modified or replaced"):
        run(model, sample())


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LoadError, match="offload folder"):
        ours.disk_offload(stack(), tmp_path / "file" / "offload")


def test_index_entries_convert_to_the_models_dtype(tmp_path: Path, each_way: str) -> None:
    model = stack().to(torch.bfloat16)
    expected = run(model, sample().to(torch.bfloat16))
    directory = save(stack().to(torch.bfloat16).to(torch.float32), tmp_path / "model")
    with ours.init_empty_weights():
        empty = Stack().eval()
    ours.load_checkpoint_and_dispatch(
        empty, directory, {"": "disk"}, offload_folder=tmp_path / "offload", dtype="bfloat16"
    )
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.bfloat16}
    assert torch.equal(run(empty, sample().to(torch.bfloat16)), expected)


def test_a_pickled_state_dict_is_loaded_to_disk(tmp_path: Path) -> None:
    model = stack()
    expected = run(model, sample())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with ours.init_empty_weights():
        empty = Stack().eval()
    ours.load_checkpoint_and_dispatch(empty, tmp_path, {"": "disk"}, offload_folder=tmp_path / "offload")
    (tmp_path / "pytorch_model.bin").unlink()
    assert torch.equal(run(empty, sample()), expected)


def test_the_index_written_at_load_names_the_checkpoint(tmp_path: Path) -> None:
    directory = save(stack(), tmp_path / "model")
    model = Stack()
    ours.load_checkpoint_in_model(model, directory, {"": "disk"}, offload_folder=tmp_path / "offload")
    index = json.loads((tmp_path / "offload" / "index.json").read_text(encoding="utf-8"))
    assert index.keys() == dict(model.named_parameters()).keys()
    assert {row["safetensors_file"] for row in index.values()} == {str(directory / "model.safetensors")}
    assert list((tmp_path / "offload").glob("*.dat")) == []


def test_hooks_given_by_hand_share_nothing() -> None:
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    for layer in layers:
        ours.add_hook_to_module(layer, ours.AlignDevicesHook(execution_device="cpu", offload=True))
    first, second = (align_hooks(layer)[0] for layer in layers)
    assert first.state is not second.state


@pytest.mark.parametrize("encode", [None, "auto"])
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_inference_mode_and_other_modes_take_turns(
    first: Callable[[], Any], encode: str | None, each_way: str, tmp_path: Path
) -> None:
    source, x = stack().to(torch.bfloat16), sample().to(torch.bfloat16)
    expected = run(source, x)
    model = ours.disk_offload(source, tmp_path, encode=encode)
    for mode in (first, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(model(x), expected)
