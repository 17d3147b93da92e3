"""The optimizer as one optax chain."""

import optax


def learning_rate_schedule(
    peak: float, schedule: str, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then constant, or a half cosine to 0."""
    after = total_steps - warmup_steps
    main = (
        optax.cosine_decay_schedule(peak, after)
        if schedule == "cosine"
        else optax.constant_schedule(peak)
    )
    if not warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, main], [warmup_steps])


def make_optimizer(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, Alg. 2), after clipping to a global norm when > 0.

    The paper trains with weight decay 0: it is an argument here because optax's default is not 0.
    """
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    parts.append(optax.scale_by_adam(b1, b2, eps))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*parts)
