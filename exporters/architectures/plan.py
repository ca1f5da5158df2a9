"""What an architecture says about a model: blocks of operations, and where each tensor comes from.

Knows: the nouns of a plan and how blocks are put together. Does not know: any family, formats, or tensor values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edge_runtime.bundle.manifest import Rope
from edge_runtime.bundle.operations import Attribute, Operation

# What a tensor is for decides the format it gets (see exporters/quantize.py).
LINEAR, HEAD, EMBEDDING, ROUTER, VECTOR, TABLE = "linear", "head", "embedding", "router", "vector", "table"
SHARED_KEY_VALUE = (
    "shared_key_value"  # k and v that several query heads share: small, and read by all of them
)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor of the bundle: `rows` rows from `first_row` of a checkpoint tensor, plus `offset` on each value."""

    name: str
    role: str
    sources: tuple[str, ...]  # spellings in checkpoints, the usual one first
    stored_shape: tuple[int, ...]
    first_row: int = 0
    rows: int = -1  # -1: all
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape if self.rows < 0 else (self.rows, *self.stored_shape[1:])


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How checkpoints spell a layer's experts: per expert (`{expert}` is its number), or fused over all of them."""

    gate: str
    up: str
    down: str
    fused_gate_up: str
    fused_down: str


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """All experts of a layer: gate and up [intermediate, hidden], down [hidden, intermediate]."""

    name: str
    names: ExpertNames
    experts: int
    hidden: int
    intermediate: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.experts, self.intermediate, self.hidden)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block; `shared` names the blocks whose tensors it uses too (a tied head uses the embedding's)."""

    name: str
    operations: tuple[Operation, ...]
    tensors: tuple[TensorPlan | ExpertsPlan, ...]
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A whole model, before any weight was read."""

    family: str
    kind: str  # "generator" or "encoder"
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    kv_width: int  # kv_heads * head_dim
    embedding: BlockPlan
    layers: tuple[BlockPlan, ...]
    head: BlockPlan
    ropes: Mapping[str, Rope] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[BlockPlan, ...]:
        return (self.embedding, *self.layers, self.head)


class BlockBuilder:
    """Collects a block's operations and tensors. Methods take and return value names.

    `path` is where the block's operations are named ("/model/layers.3"), `prefix` where its tensors are
    ("model.layers.3.").
    """

    def __init__(
        self,
        name: str,
        path: str,
        prefix: str,
        spell: Callable[[str], tuple[str, ...]] = lambda full_name: (full_name,),
    ) -> None:
        self.name = name
        self.path = path
        self.prefix = prefix
        self._spell = spell  # a full name -> every way checkpoints write it
        self._operations: list[Operation] = []
        self._tensors: list[TensorPlan | ExpertsPlan] = []

    def add(
        self,
        kind: str,
        name: str,
        inputs: tuple[str, ...],
        *,
        output: str = "",
        weights: Mapping[str, str] | None = None,
        **attributes: Attribute,
    ) -> str:
        """One operation; its value is called `output`, or `name` with dots for slashes."""
        output = output or name.replace("/", ".")
        self._operations.append(
            Operation(kind, f"{self.path}/{name}", inputs, (output,), weights or {}, attributes)
        )
        return output

    def tensor(
        self,
        name: str,
        role: str,
        shape: tuple[int, ...],
        *,
        spellings: tuple[str, ...] = (),
        first_row: int = 0,
        rows: int = -1,
        offset: float = 0.0,
    ) -> str:
        """A weight called `name` below the prefix, in the bundle and, unless spelt otherwise, in the checkpoint."""
        full = self.prefix + name
        sources = tuple(s for spelling in spellings or (name,) for s in self._spell(self.prefix + spelling))
        self._tensors.append(TensorPlan(full, role, sources, shape, first_row, rows, offset))
        return full

    def experts(self, plan: ExpertsPlan) -> str:
        self._tensors.append(plan)
        return plan.name

    def linear(
        self,
        value: str,
        name: str,
        shape: tuple[int, int],
        *,
        bias: bool = False,
        output: str = "",
        role: str = LINEAR,
        spellings: tuple[str, ...] = (),
    ) -> str:
        """y = x W^T (+ b); weight [out, in] called `name`.weight; dots become slashes in the operation's name."""
        weights = {
            "weight": self.tensor(
                f"{name}.weight", role, shape, spellings=tuple(f"{s}.weight" for s in spellings)
            )
        }
        if bias:
            weights["bias"] = self.tensor(f"{name}.bias", VECTOR, shape[:1])
        return self.add("linear", name.replace(".", "/"), (value,), output=output, weights=weights)

    def part_of(
        self,
        value: str,
        name: str,
        fused: str,
        stored: tuple[int, int],
        first: int,
        rows: int,
        role: str = LINEAR,
    ) -> str:
        """A linear whose weight is some rows of a fused checkpoint tensor."""
        weight = self.tensor(
            f"{name}.weight", role, stored, spellings=(f"{fused}.weight",), first_row=first, rows=rows
        )
        return self.add("linear", name.replace(".", "/"), (value,), weights={"weight": weight})

    def block(self, *shared: str) -> BlockPlan:
        return BlockPlan(self.name, tuple(self._operations), tuple(self._tensors), shared)
