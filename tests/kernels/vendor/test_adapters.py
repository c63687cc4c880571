"""Libraries of others, with stand-ins for them: found or not, too old or not, refused where their numbers differ."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron.config.kernels import KernelsConfig
from megatron.kernels.attention import causal_attention
from megatron.kernels.vendor.library import Place
from megatron.kernels.vendor.select import VendorKernels, load_vendor_kernels
from megatron.utils.errors import ConfigError

A100 = Place(torch.device("cpu"), (8, 0))  # tensors on the CPU, where the stand-ins compute
HEADS = {"heads": 4, "key_value_heads": 2, "head_dim": 16}
Patch = pytest.MonkeyPatch


def load(place: Place = A100, head_dim: int = 16, **keys: bool) -> VendorKernels:
    return load_vendor_kernels(KernelsConfig(**keys), place, **(HEADS | {"head_dim": head_dim}))  # type: ignore[arg-type]


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """As flash_attn_func: [b, s, heads, d], and only the options that are used."""
    assert options == {"causal": True, "deterministic": False}
    mixed = causal_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return mixed.transpose(1, 2).to(query.dtype)


def without_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*swapped, enable_gqa=True).transpose(1, 2)


def other_grouping(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Query heads 0, 1 | 2, 3 of the key heads 0 | 1 become 0, 2 | 1, 3."""
    order = torch.tensor([0, 2, 1, 3])
    return attention(query[:, :, order], key, value, **options)[:, :, order]


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 1.02


def wrong_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    return attention(query, _WrongBackward.apply(key), value, **options)


def not_a_number(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    return attention(query, key, value, **options) * torch.nan


def other_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    return attention(query, key, value, **options).transpose(1, 2)


def give_flash(monkeypatch: Patch, function: Any = attention, version: str = "2.8.3") -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_func, module.__version__ = function, version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def give_apex(monkeypatch: Patch, function: Any) -> None:
    module = ModuleType("fused_weight_gradient_mlp_cuda")
    if function is not None:
        module.wgrad_gemm_accum_fp32 = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", module)


def fused(inputs: torch.Tensor, grad_output: torch.Tensor, total: torch.Tensor) -> None:
    """In apex's order of arguments."""
    total.addmm_(grad_output.float().t(), inputs.float())


def overwriting(inputs: torch.Tensor, grad_output: torch.Tensor, total: torch.Tensor) -> None:
    total.copy_(grad_output.float().t() @ inputs.float())


def test_nothing_is_imported_unless_asked_for(monkeypatch: Patch) -> None:
    for name in ("flash_attn", "fused_weight_gradient_mlp_cuda"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    assert load() == VendorKernels(None, None, ())
    assert load(Place(torch.device("cpu"), None)) == VendorKernels(None, None, ())


@pytest.mark.parametrize("version", ["2.4.1", "2.8.3.post1", "2.10"])
def test_flash_attention_that_agrees_is_used(monkeypatch: Patch, version: str) -> None:
    give_flash(monkeypatch, version=version)
    found = load(flash_attention=True)
    assert found.attend is not None and found.accumulate is None
    assert found.words[0].startswith(f"flash-attn {version} (error against float64")
    query, key, value = (torch.randn(2, heads, 5, 16).bfloat16() for heads in (4, 2, 2))
    expected = causal_attention(query, key, value).bfloat16()
    assert torch.equal(found.attend(query, key, value), expected)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (without_mask, "output is off by"),
        (other_grouping, "output is off by"),
        (wrong_backward, "gradient of the key is off by"),
        (not_a_number, "output is off by nan"),
        (other_shape, r"output has the shape \(2, 300, 4, 16\), not \(2, 4, 300, 16\)"),
    ],
)
def test_flash_attention_with_other_numbers_is_refused(monkeypatch: Patch, function: Any, what: str) -> None:
    give_flash(monkeypatch, function)
    with pytest.raises(ConfigError, match=f"kernels.flash_attention=true is refused.*{what}"):
        load(flash_attention=True)


def test_the_refusal_gives_the_figures(monkeypatch: Patch) -> None:
    give_flash(monkeypatch, without_mask)
    pattern = (
        r"off by \d\.\de[+-]\d\d, the reference's by \d\.\de-0\d; allowed is \d\.\de-0\d; use kernels.flash_attention"
    )
    with pytest.raises(ConfigError, match=pattern):
        load(flash_attention=True)


@pytest.mark.parametrize("version", ["2.4.0", "1.0.9", "3.0.0b1", "unknown"])
def test_other_versions_of_flash_attention_are_refused(monkeypatch: Patch, version: str) -> None:
    give_flash(monkeypatch, version=version)
    with pytest.raises(ConfigError, match=f"of version {version}; known is how to use 2.4.1 up to, not including, 3; "):
        load(flash_attention=True)


@pytest.mark.parametrize("head_dim", [12, 264])
def test_heads_that_flash_attention_cannot_take(monkeypatch: Patch, head_dim: int) -> None:
    give_flash(monkeypatch)
    with pytest.raises(ConfigError, match=f"heads of size {head_dim}: flash-attn takes multiples of 8 up to 256"):
        load(flash_attention=True, head_dim=head_dim)


@pytest.mark.parametrize("key", ["flash_attention", "apex"])
def test_a_missing_library_is_an_error_with_its_cure(monkeypatch: Patch, key: str) -> None:
    name = {"flash_attention": "flash_attn", "apex": "fused_weight_gradient_mlp_cuda"}[key]
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=f"kernels.{key}=true, but there is no module {name}; .*kernels.{key}=false"):
        load(**{key: True})


@pytest.mark.parametrize("error", [ImportError("undefined symbol: x"), OSError("libcudart.so.12: cannot open")])
def test_a_library_that_does_not_load_is_an_error(monkeypatch: Patch, error: Exception) -> None:
    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "flash_attn":
                raise error

    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ConfigError, match=f"flash_attn does not load: {error}; install flash-attn"):
        load(flash_attention=True)


@pytest.mark.parametrize("key", ["flash_attention", "apex"])
def test_the_gpu_must_fit(monkeypatch: Patch, key: str) -> None:
    give_flash(monkeypatch)
    give_apex(monkeypatch, fused)
    with pytest.raises(ConfigError, match=r"runs on cpu: it needs a GPU of compute capability 8.0 or higher"):
        load(Place(torch.device("cpu"), None), **{key: True})
    with pytest.raises(ConfigError, match=r"has compute capability 7.5: it needs"):
        load(Place(torch.device("cpu"), (7, 5)), **{key: True})


def test_apex_that_agrees_is_used(monkeypatch: Patch) -> None:
    give_apex(monkeypatch, fused)
    found = load(apex=True)
    assert found.attend is None and found.accumulate is not None
    total, grad_output, inputs = torch.ones(3, 2), torch.randn(5, 3).bfloat16(), torch.randn(5, 2).bfloat16()
    found.accumulate(total, grad_output, inputs)
    torch.testing.assert_close(total, 1 + grad_output.float().t() @ inputs.float())


def test_apex_that_overwrites_is_refused(monkeypatch: Patch) -> None:
    give_apex(monkeypatch, overwriting)
    with pytest.raises(ConfigError, match=r"kernels.apex=true is refused.*sum of weight gradients is off by"):
        load(apex=True)


def test_apex_without_the_function_is_too_old(monkeypatch: Patch) -> None:
    give_apex(monkeypatch, None)
    with pytest.raises(ConfigError, match="too old: it has no wgrad_gemm_accum_fp32; build NVIDIA apex"):
        load(apex=True)
