"""The sizes of a micro-batch's tensors on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from megalard.config.objective import RELATIONS
from megalard.config.schema import StreamConfig
from megalard.estimate.rank_layout import RankLayout
from megalard.model.spec import ModelSpec
from megalard.parallel.context.schedule import difference_cover

FP32_BYTES = 4


@dataclass(frozen=True)
class Sizes:
    """The sizes of one rank's share of a micro-batch.

    Attributes:
        spec: the shape of the model.
        stream: the stream that the micro-batch is of.
        layout: the layout of ranks.
        element: bytes of an activation.
        repeats_kv: whether attention repeats the heads of k and v for groups of query heads.
    """

    spec: ModelSpec
    stream: StreamConfig
    layout: RankLayout
    element: int
    repeats_kv: bool = False

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return self.stream.micro_batch

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of the stream that this rank reads in a step."""
        return -(-self.stream.global_batch // (self.stream.micro_batch * self.layout.dp))

    @property
    def all_tokens(self) -> int:
        """The tokens of the complete blocks, over all cp ranks."""
        return self.blocks * self.stream.data.context_length

    @property
    def tokens(self) -> int:
        """The tokens of this rank: t."""
        return self.all_tokens // self.layout.cp

    @property
    def rows(self) -> int:
        """The rows of the residual stream: t / tp, rounded up."""
        return -(-self.tokens // self.layout.tp)

    @property
    def heads(self) -> int:
        """The query heads of this rank."""
        return self.spec.num_heads // self.layout.tp

    @property
    def kv_heads(self) -> int:
        """The key/value heads of this rank."""
        return max(1, self.spec.num_kv_heads // self.layout.tp)

    def features(self, operand: str) -> int:
        """Return the features of q, k or v on this rank."""
        return self.spec.head_dim * (self.heads if operand == "q" else self.kv_heads)

    @property
    def q(self) -> int:
        """Bytes of q, or of the attention output."""
        return self.tokens * self.features("q") * self.element

    @property
    def k(self) -> int:
        """Bytes of k, or of v."""
        return self.tokens * self.features("k") * self.element

    @property
    def attended_k(self) -> int:
        """Bytes of this rank's k, or v, as attention keeps it."""
        return self.q if self.repeats_kv else self.k

    @property
    def qkv(self) -> int:
        """Bytes of q, k and v."""
        return self.q + 2 * self.k

    @property
    def residual(self) -> int:
        """Bytes of the residual stream: [t / tp, hidden]."""
        return self.rows * self.spec.hidden_size * self.element

    @property
    def hidden(self) -> int:
        """Bytes of hidden states that are gathered over tp: [t, hidden]."""
        return self.tokens * self.spec.hidden_size * self.element

    @property
    def gate(self) -> int:
        """Bytes of the MLP's gate, which has as many features as up: [t, intermediate / tp]."""
        return self.tokens * self.spec.intermediate_size // self.layout.tp * self.element

    @property
    def vocabulary(self) -> int:
        """The rows of the vocabulary on this rank."""
        return -(-self.spec.vocab_size // self.layout.tp)

    @property
    def row_statistics(self) -> int:
        """Bytes of one fp32 number per token and query head."""
        return FP32_BYTES * self.tokens * self.heads

    @property
    def rope_tables(self) -> int:
        """Bytes of cos and sin of one model."""
        return 2 * FP32_BYTES * self.tokens * self.spec.rotary_dim

    @property
    def chunks_held(self) -> int:
        """The chunks that this rank holds while it computes relations: |A|."""
        return len(difference_cover(self.layout.cp))

    @property
    def batch(self) -> int:
        """Bytes of the micro-batch's tokens, targets, positions, reaches and documents."""
        per_token, per_token_of_block = 6 * 8 + 8 // self.blocks, 2 * 4
        return per_token * self.tokens + per_token_of_block * self.all_tokens

    @property
    def operands(self) -> list[str]:
        """The operands that the relations of the stream read."""
        relations = self.stream.objective.active_relations()
        return sorted({kind for name in relations for kind in RELATIONS[name].operands})

    @property
    def operand_features(self) -> int:
        """The features of all operands that relations read."""
        return sum(map(self.features, self.operands))

    def relation_heads(self, name: str) -> int:
        """Return the heads of a relation on this rank."""
        return self.heads if RELATIONS[name].rows == "q" else self.kv_heads
