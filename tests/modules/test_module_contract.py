"""What every public module keeps to, whatever it computes."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torchrec.fx
from torch import Tensor

from torchrec_hilomoe import modules
from torchrec_hilomoe.modules import Routing

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def flat(output: Tensor | Routing) -> Tensor:
    return output if isinstance(output, Tensor) else torch.cat([t.flatten(1) for t in output], 1)


def rows(inputs: tuple, chosen: Tensor) -> tuple:
    return tuple(
        t[chosen] if isinstance(t, Tensor) else Routing(*(r[chosen] for r in t)) for t in inputs
    )


def test_samples_do_not_see_each_other(case) -> None:
    module, inputs = case.make_with_experts().eval(), case.inputs(7)
    whole = flat(module(*inputs))
    for sample in range(7):
        alone = flat(module(*rows(inputs, torch.tensor([sample]))))
        torch.testing.assert_close(alone, whole[sample : sample + 1], rtol=1e-5, atol=1e-6)


def test_gradient_of_one_sample_stays_with_it(case) -> None:
    module, inputs = case.make_with_experts().eval(), case.inputs(5)
    x = inputs[0].requires_grad_()
    flat(module(x, *inputs[1:]))[2].sum().backward()
    touched = x.grad.flatten(1).abs().sum(1) > 0
    assert touched.tolist() == [False, False, True, False, False]


def test_empty_batch(case) -> None:
    module = case.make_with_experts()
    assert flat(module(*case.inputs(0))).size(0) == 0


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, torchrec.fx.symbolic_trace])
def test_traced_then_scripted_equals_eager(case, trace) -> None:
    module = case.make_with_experts().eval()
    traced = trace(module)
    scripted = torch.jit.script(traced)
    for batch in (5, 3, 4):
        inputs = case.inputs(batch)
        expected = flat(module(*inputs))
        assert torch.equal(flat(traced(*inputs)), expected)
        torch.testing.assert_close(flat(scripted(*inputs)), expected)


def test_scripted_survives_autocast_and_saving(case) -> None:
    module, inputs = case.make_with_experts().eval(), case.inputs(5)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.fx.symbolic_trace(module)), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    torch.testing.assert_close(flat(scripted(*inputs)), flat(module(*inputs)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = flat(module(*inputs))
        torch.testing.assert_close(flat(scripted(*inputs)), expected, rtol=0.05, atol=0.05)


def test_tracing_in_training_mode_leaves_no_trace(case) -> None:
    module = case.make_with_experts().train()
    torch.fx.symbolic_trace(module)
    for router in module.modules():
        if isinstance(router, modules.HierarchicalRouter):
            assert isinstance(router.routing.scores, Tensor)


def test_exported_equals_eager_for_any_batch(case) -> None:
    module, inputs = case.make_with_experts().eval(), case.inputs(5)
    auto = {0: torch.export.Dim.AUTO}
    shapes = tuple(auto if isinstance(t, Tensor) else Routing(auto, auto) for t in inputs)
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes).module()
    for batch in (5, 9):
        inputs = case.inputs(batch)
        torch.testing.assert_close(flat(exported(*inputs)), flat(module(*inputs)))


@pytest.mark.slow
def test_compiles_without_graph_break(case) -> None:
    torch.compiler.reset()
    module, inputs = case.make_with_experts(), case.inputs(5)
    expected = flat(module.eval()(*inputs))
    keys = list(module.state_dict())
    module.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(module(*inputs)), expected)
    flat(module.train()(*inputs)).sum().backward()
    assert list(module.state_dict()) == keys


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    arch = modules.HiLoMoEInteractionArch(2, 8, 16, modules.HiLoMoEConfig(3, 4))
    torch.nn.init.normal_(arch.linear.expert_u)
    eager = copy.deepcopy(arch)
    arch.compile(fullgraph=True)
    assert arch.state_dict().keys() == eager.state_dict().keys()
    inputs = torch.randn(5, 8), torch.randn(5, 2, 8)
    for model in (arch, eager):
        model(*inputs).square().sum().backward()
    torch.testing.assert_close(arch(*inputs), eager(*inputs))
    for compiled, expected in zip(arch.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, expected.grad, rtol=1e-4, atol=1e-4)
    for kept, expected in zip(arch.linear.router.routing, eager.linear.router.routing, strict=True):
        torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_honoured(case, dtype) -> None:
    module = case.make(dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    inputs = [t.to(dtype) if isinstance(t, Tensor) else t for t in case.inputs(5)]
    output = module(*inputs)
    if isinstance(output, Routing):
        assert output.scores.dtype == torch.promote_types(dtype, torch.float32)
    else:
        assert output.dtype == dtype


def test_meta_device_then_materialised(case) -> None:
    module = case.make(device=torch.device("meta"))
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    assert flat(module(*case.inputs(5))).isfinite().all()


def test_copies_and_pickles_after_a_forward(case) -> None:
    module, inputs = case.make_with_experts(), case.inputs(5)
    flat(module(*inputs)).sum().backward()
    expected = flat(module.eval()(*inputs))
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(flat(clone(*inputs)), expected)


def test_state_dict_holds_parameters_only(case) -> None:
    module = case.make()
    module(*case.inputs(5))
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}


def test_repr_names_sizes(case) -> None:
    assert "num_layers=3, num_experts=4" in repr(case.make())


@pytest.mark.parametrize(
    "module_class",
    [
        member
        for member in vars(modules).values()
        if inspect.isclass(member) and issubclass(member, torch.nn.Module)
    ],
)
def test_few_constructor_arguments(module_class) -> None:
    """As TorchRec asks of its own modules: beyond a few arguments, a config."""
    arguments = set(inspect.signature(module_class).parameters) - {"device", "dtype"}
    assert len(arguments) <= 5
