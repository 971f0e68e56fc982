"""Attention that never holds a [T, T] array: cuDNN's kernel on NVIDIA GPUs, splash on TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec

from uld_jax.models.config import DecoderConfig, Policy
from uld_jax.sharding import BATCH_AXES, platform

BACKENDS = ("auto", "xla", "cudnn", "splash")

# The kernel works on whole lanes of a TPU, and prefers large blocks that still fit its memory.
LANES, BLOCK = 128, 512
# The name of what its backward pass needs of the forward pass besides its arguments.
KEPT = "splash_residuals"


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
    heads, parts = _shards()
    can_cudnn = half and not c.attention_softcap and c.head_dim % 8 == 0 and c.head_dim <= 128
    can_cudnn &= parts == 1  # it takes whole rows only
    can_splash = length % (LANES * parts) == 0 and c.positions != "alibi"
    can_splash &= c.kv_heads % heads == 0
    if policy.attention != "auto":
        possible = {"splash": can_splash, "cudnn": parts == 1}.get(policy.attention, True)
        return policy.attention if possible else "xla"
    backend = platform()
    if backend == "gpu" and can_cudnn:
        return "cudnn"
    return "splash" if backend == "tpu" and can_splash else "xla"


def _shards() -> tuple[int, int]:
    """Of the heads, and of a row's queries."""
    mesh = jax.sharding.get_abstract_mesh()
    return (1, 1) if mesh.empty else (mesh.shape["tensor"], mesh.shape["sequence"])


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

    Where the mesh cuts rows into parts (its sequence axis), a device has the queries of its part
    and the keys and values of the whole row.

    Args:
        q_BTHh: Queries; T a multiple of 128 times the size of the sequence axis.
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
    head_shards, parts = _shards()
    block = max(size for size in (LANES, 2 * LANES, BLOCK) if length // parts % size == 0)
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
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * q_BTHh.shape[2]),
        block_sizes=sizes,
        head_shards=head_shards,
        q_seq_shards=parts,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )

    def on_shard(attend: Any, q: Any, *others: Any) -> jax.Array:
        whole = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in others)
        k, v, segments = whole if parts > 1 else others
        heads_first = (x.swapaxes(1, 2) for x in (q * scale, k, v))
        out: Any = jax.vmap(attend)(*heads_first, kernel.SegmentIds(others[2], segments))
        return out.swapaxes(1, 2).astype(q.dtype)

    if parts > 1:
        # The backward pass gathers keys and values again, and runs no kernel a second time.
        policy = jax.checkpoint_policies.save_only_these_names(KEPT)
        on_shard = jax.checkpoint(on_shard, policy=policy, prevent_cse=False)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # A kernel is opaque to the partitioner: rows and heads are cut by hand.
        blocks: Any = NamedSharding(mesh, PartitionSpec("tensor", "sequence"))
        own = PartitionSpec(BATCH_AXES, "sequence", "tensor")
        segments = PartitionSpec(BATCH_AXES, "sequence")
        specs = (attend.manual_sharding_spec(blocks), own, own, own, segments)
        on_shard = jax.shard_map(on_shard, in_specs=specs, out_specs=own, check_vma=False)
    return on_shard(attend, q_BTHh, k_BTKh, v_BTKh, segments_BT)
