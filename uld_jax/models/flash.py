"""Attention that never holds a [T, T] array: cuDNN's kernel on NVIDIA GPUs, splash on TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from uld_jax.models.config import DecoderConfig, Policy
from uld_jax.sharding import BATCH_AXES, platform

BACKENDS = ("auto", "xla", "cudnn", "splash")

# The kernel works on whole lanes of a TPU, and prefers large blocks that still fit its memory.
LANES, BLOCK = 128, 512


def choose_backend(c: DecoderConfig, policy: Policy, length: int) -> str:
    """Which attention a whole sequence is computed with.

    Args:
        c: The decoder.
        policy: Its `attention` names a backend; "auto" takes the best of the devices' that can
            compute this model and length, "xla" where there is none.
        length: Positions T.

    Returns:
        "xla", "cudnn" or "splash".

    Example:
        >>> from uld_jax.testing import tiny_config
        >>> choose_backend(tiny_config(), Policy(), 128)
        'xla'
    """
    half = policy.dtype == "bfloat16"
    can_cudnn = half and not c.attention_softcap and c.head_dim % 8 == 0 and c.head_dim <= 128
    can_splash = length % LANES == 0 and c.positions != "alibi" and _heads_divide(c)
    if policy.attention != "auto":
        return policy.attention if policy.attention != "splash" or can_splash else "xla"
    backend = platform()
    if backend == "gpu" and can_cudnn:
        return "cudnn"
    return "splash" if backend == "tpu" and can_splash else "xla"


def _heads_divide(c: DecoderConfig) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or c.kv_heads % mesh.shape["tensor"] == 0


def splash_attention(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segments_BT: jax.Array | None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """Causal grouped-query attention by JAX's Pallas kernel for TPUs.

    Args:
        q_BTHh: Queries; T a multiple of 128.
        k_BTKh: Keys, K dividing H.
        v_BTKh: Values.
        segments_BT: int32 segment ids; tokens see their own segment only. None for one segment.
        scale: Factor on the products.
        window: Tokens a query sees, itself included; 0 for all before it.
        softcap: c in c · tanh(score / c); 0 for none.
        interpret: Runs the kernel as plain operations, on any machine.

    Returns:
        [B, T, H, h] in the queries' dtype.

    Reference:
        Dao et al., arXiv 2205.14135, for the algorithm.
    """
    length = q_BTHh.shape[1]
    if segments_BT is None:
        segments_BT = jnp.ones(q_BTHh.shape[:2], jnp.int32)
    block = max(size for size in (LANES, 2 * LANES, BLOCK) if length % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    shape = (length, length)
    one = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)

    def on_shard(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        attend = kernel.make_splash_mha(
            masks.MultiHeadMask([one] * q.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap or None,
            interpret=interpret,
        )
        heads_first = (x.swapaxes(1, 2) for x in (q * scale, k, v))
        out: Any = jax.vmap(attend)(*heads_first, kernel.SegmentIds(segments, segments))
        return out.swapaxes(1, 2).astype(q.dtype)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # A kernel is opaque to the partitioner: rows and heads are cut by hand.
        by_head = PartitionSpec(BATCH_AXES, None, "tensor", None)
        specs = (by_head, by_head, by_head, PartitionSpec(BATCH_AXES))
        on_shard = jax.shard_map(on_shard, in_specs=specs, out_specs=by_head, check_vma=False)
    return on_shard(q_BTHh, k_BTKh, v_BTKh, segments_BT)
