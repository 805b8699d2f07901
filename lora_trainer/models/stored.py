"""Frozen weights that are decoded where they are used, and kept by nobody in the dtype that they compute in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lora_trainer.models.storage import Codes, Storage

_aten = torch.ops.aten


class Stored(Tensor):
    """A weight of some shape and compute dtype to all who read it, held as the `codes` of a `storage`.

    Each operation on it decodes it for itself. What autograd saves for the backward pass is this tensor, so the decoded
    one lives only inside an operation; the same in a captured step. Reshaping, transposing and casting it give the same
    codes another form. Writing to it raises RuntimeError.
    """

    codes: Codes
    storage: Storage
    whole: torch.Size
    turned: bool

    @staticmethod
    def __new__(
        cls: type, codes: Codes, storage: Storage, whole: torch.Size, like: Tensor, *, turned: bool = False
    ) -> Stored:
        """`whole`: the shape that was encoded; `like`: any tensor of the shape, strides and dtype that this one has,
        whose numbers are not read. `turned`: this is a matrix's transpose."""
        self = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=codes[0].device, requires_grad=False
        )
        self.codes, self.storage, self.whole, self.turned = codes, storage, whole, turned
        return self

    @classmethod
    def encode(cls, weight: Tensor, storage: Storage) -> Stored:
        """A copy of `weight` in `storage`; all but the first dimension count as the inputs."""
        matrix = weight.contiguous().flatten(1)
        return cls(storage.encode(matrix), storage, matrix.shape, weight.contiguous().to("meta"))

    @classmethod
    def over(cls, codes: Tensor, storage: Storage, dtype: torch.dtype) -> Stored:
        """A view of somebody's tensor that is in a `storage` without scales, as `dtype`."""
        return cls((codes,), storage, codes.shape, torch.empty_like(codes, device="meta", dtype=dtype))

    def decoded(self) -> Tensor:
        """A new tensor with its values."""
        whole = self.storage.decode(self.codes, self.whole, self.dtype)
        return whole.view(self.shape[::-1]).t() if self.turned else whole.view(self.shape)

    @property
    def stored_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.codes)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Stored({self.storage.name}, {tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        form = _FORMS.get(func)
        if form is not None and isinstance(args[0], Stored):
            found = form(*args, **kwargs)
            if found is not None:
                return found
        if func._schema.is_mutable and any(isinstance(each, Stored) for each in (*args[:1], kwargs.get("out"))):
            raise RuntimeError(f"{func}: {args[0]!r} is a frozen weight in storage, which nothing can write to")
        return func(*tree_map_only(Stored, Stored.decoded, args), **tree_map_only(Stored, Stored.decoded, kwargs))

    def _same(self, like: Tensor, *, turned: bool) -> Stored:
        return Stored(self.codes, self.storage, self.whole, like, turned=turned)

    @property
    def _form(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")


def dense(weight: Tensor) -> Tensor:
    """`weight` as a tensor with memory of its own numbers, for kernels that read it by its address."""
    return weight.decoded() if isinstance(weight, Stored) else weight


def stored_in(network: nn.Module) -> list[Stored]:
    """The weights of `network` that are in a storage."""
    return [parameter for parameter in network.parameters() if isinstance(parameter, Stored)]


def told_of(network: nn.Module) -> Iterator[str]:
    """How much of `network` is in a storage, in words, if anything is."""
    stored = stored_in(network)
    if stored:
        taken = sum(weight.stored_bytes for weight in stored) / 1e9
        usual = sum(weight.numel() * weight.element_size() for weight in stored) / 1e9
        yield (
            f"base: {len(stored)} weights of the UNet are kept in {stored[0].storage.name}, {taken:.2f} GB in place of "
            f"{usual:.2f}"
        )


def _view(weight: Stored, size: list[int]) -> Stored | None:
    return None if weight.turned else weight._same(weight._form.view(size), turned=False)


def _t(weight: Stored) -> Stored | None:
    if weight.dim() != 2:
        return None
    return weight._same(weight._form.t(), turned=not weight.turned)


def _transposed(weight: Stored, first: int, second: int) -> Stored | None:
    return _t(weight) if {first % weight.dim(), second % weight.dim()} == {0, 1} else None


def _cast(weight: Stored, **kwargs: Any) -> Stored | None:
    dtype, device = kwargs.get("dtype") or weight.dtype, kwargs.get("device") or weight.device
    laid_out = kwargs.get("memory_format") not in (None, torch.preserve_format)
    if laid_out or not dtype.is_floating_point or dtype.itemsize < 2 or torch.device(device) != weight.device:
        return None
    return weight._same(weight._form.to(dtype), turned=weight.turned)


# Operations that decode nothing; None where one does after all.
_FORMS = {
    _aten.detach.default: lambda weight: weight._same(weight._form, turned=weight.turned),
    _aten.alias.default: lambda weight: weight._same(weight._form, turned=weight.turned),
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.t.default: _t,
    _aten.transpose.int: _transposed,
    _aten._to_copy.default: _cast,
}
