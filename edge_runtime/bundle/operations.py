"""What a model does, as data: the list of operations of each block.

A block (the embedding, one layer, or the head) is a list of operations over named values. Executors run the same
list: `engine/reference` interprets it, `engine/cpu` runs segments between the *cut operations*, on our own kernels or
as compiled graphs, and the cut operations itself. Values are float32 arrays [R, width], one row per
token; `hidden` enters and leaves a block.

Knows: the closed table of operation kinds, their slots and attributes. Does not know: weights, formats, executors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_runtime.errors import BundleError

Attribute = int | float | str | bool


@dataclass(frozen=True, slots=True)
class OperationKind:
    """How many values go in and out, which weights it takes, which attributes it must have."""

    inputs: int
    outputs: int
    weights: frozenset[str] = frozenset()
    optional_weights: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    is_cut: bool = False


def _kind(
    inputs: int,
    outputs: int = 1,
    *,
    weights: str = "",
    optional: str = "",
    attributes: str = "",
    cut: bool = False,
) -> OperationKind:
    split = str.split
    return OperationKind(
        inputs,
        outputs,
        frozenset(split(weights)),
        frozenset(split(optional)),
        frozenset(split(attributes)),
        cut,
    )


OPERATION_KINDS: Mapping[str, OperationKind] = {
    # y = x / sqrt(mean(x^2) + epsilon) * weight (weights that are stored as "1 + w" are exported added up)
    "rms_norm": _kind(1, weights="weight", attributes="epsilon"),
    # y = (x - mean) / sqrt(var + epsilon) * weight + bias
    "layer_norm": _kind(1, weights="weight", optional="bias", attributes="epsilon"),
    # y = x @ weight.T + bias; weight [out, in] in any tensor format
    "linear": _kind(1, weights="weight", optional="bias"),
    "add": _kind(2),
    "mul": _kind(2),
    "silu": _kind(1),
    "gelu": _kind(1),  # exact: x * Phi(x)
    "gelu_tanh": _kind(1),
    "tanh": _kind(1),
    "scale": _kind(1, attributes="factor"),
    "softcap": _kind(1, attributes="cap"),  # cap * tanh(x / cap)
    # ---- cut operations: run by our own code, between compiled segments ----
    # token ids -> rows. `position` and `token_type` (row 0) are BERT's learnt tables, added when present.
    "embedding": _kind(0, weights="weight", optional="position token_type", attributes="factor", cut=True),
    # q [R, heads*d], k and v [R, kv_heads*d] -> [R, heads*d]. In order: optional RMS norm of q and k (weights `q_norm`,
    # `k_norm`: per head where they have d entries, over the whole row otherwise), rotary embedding (`rope` names an
    # entry of the manifest's `ropes`, "" for none; halves rotated, as in Hugging Face's `rotate_half`), append k and v
    # to the KV cache, softmax(scale * q k^T, soft-capped when `softcap` > 0) v over rows p - window < j <= p (`window`
    # 0: unlimited), or over all rows of the sequence when `causal` is false.
    "attention": _kind(
        3,
        optional="q_norm k_norm",
        attributes="heads kv_heads head_dim scale rope window softcap causal norm_epsilon",
        cut=True,
    ),
    # (x [R, hidden], router logits [R, experts]) -> [R, hidden]: softmax over all experts in fp32, the `top_k` largest
    # (ties to the lower expert), renormalised to sum 1 when `normalize`, then sum over chosen experts in gate-rank
    # order (largest gate first) of gate * down(silu(gate_proj x) * up_proj x), accumulated in fp32.
    # `softmax_after` true takes the softmax over the chosen logits only (Mixtral).
    "experts": _kind(
        2, weights="experts", attributes="experts top_k normalize softmax_after activation", cut=True
    ),
    # rows of a whole sequence -> one vector per sequence; `mode` "mean" or "cls"; `normalize` to unit length
    "pool": _kind(1, attributes="mode normalize", cut=True),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a block. `name` follows `/model/layers.N/part/op`; values live until the block ends."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, str] = field(default_factory=dict)  # slot -> tensor name in the manifest
    attributes: Mapping[str, Attribute] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = OPERATION_KINDS.get(self.kind)
        if kind is None:
            raise BundleError(
                f"{self.name}: unknown operation {self.kind!r}",
                hint="update edge-runtime on this device: the bundle was written by a newer version",
            )
        if len(self.inputs) != kind.inputs or len(self.outputs) != kind.outputs:
            raise BundleError(f"{self.name}: {self.kind} takes {kind.inputs} values and gives {kind.outputs}")
        missing = kind.weights - self.weights.keys()
        extra = self.weights.keys() - kind.weights - kind.optional_weights
        if missing or extra:
            raise BundleError(f"{self.name}: {self.kind} has weights {sorted(self.weights)}")
        if self.attributes.keys() != kind.attributes:
            raise BundleError(
                f"{self.name}: {self.kind} needs attributes {sorted(kind.attributes)}, has {sorted(self.attributes)}"
            )

    @property
    def is_cut(self) -> bool:
        return OPERATION_KINDS[self.kind].is_cut
