"""What is asked of the inside of a network: one function an analysis, from an `Instrument`.

`docs/inspect.md` has the algebra. Blocks are counted from 1; tables have one row a number.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.errors import UserError
from ditjax.evaluation.inspection import ConditionRows, Examples, Finding, Instrument, TableRow
from ditjax.metrics.probing import fit_probe
from ditjax.metrics.similarity import cknna
from ditjax.metrics.tokens import (
    attention_distance,
    attention_entropy,
    best_matches,
    correct_keypoints,
    distances,
    overlaps,
    places,
    recovered,
)
from ditjax.models.embed import patchify
from ditjax.scaling.fit import spearman
from ditjax.training.transforms import Held, without_branches

PICTURES = 6  # images in a picture
WINDOWS = 8  # a side: tokens are patched one by one, or in windows
NEIGHBOURS = 10  # of CKNNA
PROBED_NUMBERS = 4096  # numbers of an image that a probe reads; of more, the means of patches
ORDERS = 2  # random orders that branches are closed in
ROTATION, ZOOM, SHIFT = 0.45, 0.15, 0.15  # largest: radians, log of a factor, share of the side
THRESHOLDS = tuple(k / 20 for k in range(1, 20))  # of a word's map, whose largest weight is 1
INK = 0.25  # a token is compared if its pixels are that far from the image's median, of -1 to 1


# ---- probes


def _pooled(tool: Instrument) -> Callable[..., Any]:
    """(x0, eps, conditions, t, params) -> mean tokens of each block [B,L,D], and x_t [B,..]."""

    @jax.jit
    def program(x0: Any, eps: Any, conditions: Any, t: Any, params: Any) -> Any:
        x_t = tool.noised(x0, eps, t)
        _, taps = tool.observe(params, x_t, conditions, t, "tokens")
        assert taps.tokens is not None
        tokens = taps.tokens[tool.taken].astype(jnp.float32)
        return jnp.moveaxis(tokens.mean(2), 0, 1), x_t

    return program


def probe(tool: Instrument) -> Finding:
    """Linear probes of the mean token after each block, of pixels, and of an untrained network.

    The network is given null conditions, or the probe would read the label.
    """
    program, classes = _pooled(tool), tool.c.data.num_classes
    rows: list[TableRow] = []
    labels = [each.label for each in (tool.fit, tool.held)]

    def measure(i: int, kind: str, fit: np.ndarray, held: np.ndarray, **values: Any) -> None:
        found = fit_probe(fit, labels[0], classes)
        accuracy = found.accuracy(held, labels[1])
        rows.append(tool.at(i, kind=kind, **values, accuracy=accuracy, l2=found.l2))

    for i, t in enumerate(tool.times):
        read = [
            [
                tool.over(program, (e.x0, e.eps, tool.null_conditions(e)), t, params)
                for e in (tool.fit, tool.held)
            ]
            for params in (tool.params, tool.untrained)
        ]
        for k, block in enumerate(tool.blocks):
            measure(i, "block", *(x[0][:, k] for x in read[0]), block=block)
        measure(i, "untrained", *(x[0][:, -1] for x in read[1]), block=tool.blocks[-1])
        measure(i, "pixels", *(_numbers(x[1], tool.inside.grid) for x in read[0]))
    best = max((r for r in rows if r["kind"] == "block"), key=lambda r: r["accuracy"])
    same = [r for r in rows if r["share"] == best["share"] and r["kind"] == "pixels"]
    line = (
        f"the best accuracy is {best['accuracy']:.3f}, after block {best['block']} at share"
        f" {best['share']:g} of the noise; of pixels there {same[0]['accuracy']:.3f}"
    )
    return Finding({"probe": rows}, {}, line)


def _numbers(x_t: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The numbers of noisy images, or of large ones the means of their patches -> f[n,D]."""
    n, H, W, C = x_t.shape
    if H * W * C > PROBED_NUMBERS:
        x_t = x_t.reshape(n, grid[0], H // grid[0], grid[1], W // grid[1], C).mean((2, 4))
    return x_t.reshape(n, -1)


# ---- attention


def self_attention(tool: Instrument) -> Finding:
    """Entropy and mean distance of each head's self-attention on images with their conditions."""
    rows_, columns = tool.inside.grid
    N, centre = rows_ * columns, rows_ // 2 * columns + columns // 2

    @jax.jit
    def program(x0: Any, eps: Any, conditions: Any, t: Any, params: Any) -> Any:
        _, taps = tool.observe(params, tool.noised(x0, eps, t), conditions, t, "attention")
        assert taps.attention is not None
        weights = taps.attention[tool.taken][..., :N, :]  # the queries of the image
        among = weights[..., :N]
        found = (
            attention_entropy(weights),
            attention_distance(among, rows_, columns),
            among[..., centre, :],
        )
        keys = jnp.full(len(x0), weights.shape[-1])  # in_context has more than N
        return *(jnp.moveaxis(x, 0, 1) for x in found), keys

    rows: list[TableRow] = []
    pictures = np.empty(0)
    held = tool.held
    for i, t in enumerate(tool.times):
        found = tool.over(program, (held.x0, held.eps, held.conditions), t, tool.params)
        entropy, distance, maps, keys = (x.mean(0) for x in found)
        if i == tool.middle:
            pictures = maps.reshape(*maps.shape[:2], rows_, columns)
        for k, block in enumerate(tool.blocks):
            for head in range(entropy.shape[1]):
                values = {"entropy": entropy[k, head], "distance": distance[k, head]}
                values = {name: float(value) for name, value in values.items()}
                rows.append(tool.at(i, kind="head", block=block, head=head + 1, **values))
    uniform = {"entropy": float(np.log(keys)), "distance": float(distances(rows_, columns).mean())}
    rows.append({"kind": "uniform", **uniform})
    near = min((r for r in rows if r["kind"] == "head"), key=lambda r: r["distance"])
    line = (
        f"the most local head is {near['head']} of block {near['block']} at share"
        f" {near['share']:g}: {near['distance']:.2f} tokens; of all tokens alike"
        f" {uniform['distance']:.2f}"
    )
    return Finding({"attention": rows}, {"attention": pictures}, line)


# ---- the final layer as a lens


def lens(tool: Instrument) -> Finding:
    """What the layers behind the blocks make of each block's tokens, raw and tuned.

    The tuned lens (Belrose et al. 2023, arXiv:2303.08112) has an affine map of each block's tokens
    to the last block's, by least squares on images that are not measured.
    """
    program, translators, rows = _lens_errors(tool), _translators(tool), []
    pictures = np.empty(0)
    held = tool.held
    for i, t in enumerate(tool.times):
        maps = translators(t)
        found = tool.over(program, (held.x0, held.eps, held.conditions), t, tool.params, maps)
        for kind, errors in found.items():
            for k, block in enumerate(tool.blocks):
                values = dict(zip(("mse_target", "mse_last"), errors[:, k].mean(0), strict=True))
                values = {name: float(value) for name, value in values.items()}
                rows.append(tool.at(i, kind=kind, block=block, **values))
        if i == tool.middle:
            pictures = _lens_pictures(tool, t)
    share = tool.shares[tool.middle]
    errors = [r["mse_target"] for r in rows if r["kind"] == "raw" and r["share"] == share]
    line = (
        f"the error falls from {errors[0]:.3f} after block {tool.blocks[0]} to {errors[-1]:.3f}"
        f" after block {tool.blocks[-1]}, at share {share:g} of the noise"
    )
    return Finding({"lens": rows}, {"lens": pictures}, line)


def _translators(tool: Instrument) -> Callable[[np.ndarray], np.ndarray]:
    """t -> least squares of the last block's tokens from each block's and 1, f32[L,D+1,D]."""

    @jax.jit
    def sums(valid: Any, x0: Any, eps: Any, conditions: Any, t: Any, params: Any) -> Any:
        _, taps = tool.observe(params, tool.noised(x0, eps, t), conditions, t, "tokens")
        assert taps.tokens is not None
        tokens = taps.tokens.astype(jnp.float32)
        x = _with_ones(tokens[tool.taken])
        weighted = x * valid[None, :, None, None]
        return (
            jnp.einsum("lbnd,lbne->lde", weighted, x),
            jnp.einsum("lbnd,bne->lde", weighted, tokens[-1]),
        )

    def translators(t: np.ndarray) -> np.ndarray:
        fit = tool.fit
        squares, products = tool.total(sums, (fit.x0, fit.eps, fit.conditions), t, tool.params)
        ridge = 1e-6 * np.trace(squares, axis1=1, axis2=2)[:, None, None] / squares.shape[1]
        eye = np.eye(squares.shape[1])[None]
        return np.linalg.solve(squares + ridge * eye, products).astype(np.float32)

    return translators


def _with_ones(tokens: jax.Array) -> jax.Array:
    return jnp.concatenate([tokens, jnp.ones((*tokens.shape[:-1], 1))], axis=-1)


def _lens_errors(tool: Instrument) -> Callable[..., Any]:
    """-> {raw, tuned: [B,L,2]}, mean squares to the target and to the network's prediction."""

    @jax.jit
    def program(x0: Any, eps: Any, conditions: Any, t: Any, params: Any, maps: Any) -> Any:
        x_t = tool.noised(x0, eps, t)
        out, taps = tool.observe(params, x_t, conditions, t, "tokens")
        assert taps.tokens is not None
        tokens, target = taps.tokens[tool.taken], tool.target(x0, eps, t)

        def errors(tokens: jax.Array) -> jax.Array:
            seen = tool.through_lens(params, tokens, x_t, conditions, t)
            return jnp.stack([jnp.square(seen - y).mean((1, 2, 3)) for y in (target, out)], axis=1)

        def each(given: Any) -> Any:
            tokens, affine = given
            tuned = _with_ones(tokens.astype(jnp.float32)) @ affine
            return {"raw": errors(tokens), "tuned": errors(tuned.astype(tokens.dtype))}

        found = jax.lax.map(each, (tokens, maps))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)

    return program


def _lens_pictures(tool: Instrument, t: np.ndarray) -> np.ndarray:
    """Images, x_t, and x̂0 by the raw lens after each block -> f32[n,L+2,H,W,C] in [-1, 1]."""

    @jax.jit
    def program(x0: Any, eps: Any, conditions: Any, t: Any, params: Any, frozen: Any) -> Any:
        x_t = tool.noised(x0, eps, t)
        _, taps = tool.observe(params, x_t, conditions, t, "tokens")
        assert taps.tokens is not None

        def x0_of(tokens: jax.Array) -> jax.Array:
            seen = tool.through_lens(params, tokens, x_t, conditions, t)
            return tool.inside.decode(frozen, tool.x0_of(seen, x_t, t))

        found = jax.lax.map(x0_of, taps.tokens[tool.taken])
        return jnp.moveaxis(found, 0, 1), tool.inside.decode(frozen, tool.own(x_t))

    held = tool.held
    rows = jax.tree.map(lambda x: x[:PICTURES], (held.x0, held.eps, held.conditions))
    seen, noisy = tool.over(program, rows, t, tool.params, tool.frozen)
    first = [held.image[:PICTURES, None], noisy[:, None]]
    return np.clip(np.concatenate([*first, seen], axis=1), -1, 1)


# ---- patching


def patch(tool: Instrument) -> Finding:
    """How much of a label's effect passes through the tokens after each block, and which tokens.

    Causal tracing (Meng et al. 2022, arXiv:2202.05262): the corrupted run has another label, or the
    text of another image, and the same noisy image; the clean run's tokens are put in the place of
    its own. adaLN gives the label to every block, as cross-attention does a text, so that all
    tokens after block l recover what it did up to there.
    """
    held, program = tool.held, _patch_effects(tool)
    batch = (held.x0, held.eps, held.conditions, _other_conditions(tool))
    (h, w), L = tool.inside.grid, tool.inside.depth
    at = np.eye(L, dtype=bool)[tool.taken]  # [K,L]
    rows: list[TableRow] = []
    for i, t in enumerate(tool.times):
        masks = at[:, :, None] & np.ones((1, 1, h * w), bool)
        part, whole = tool.over(program, batch, t, tool.params, masks)
        for effect, block in zip(part.sum(0) / whole.sum(), tool.blocks, strict=True):
            rows.append(tool.at(i, kind="all", block=block, effect=float(effect)))
    windows = _windows(h, w)
    masks = (at[:, None, :, None] & windows[None, :, None]).reshape(-1, L, h * w)
    part, whole = tool.over(program, batch, tool.times[tool.middle], tool.params, masks)
    side = (min(h, WINDOWS), min(w, WINDOWS))
    effects = (part.sum(0) / whole.sum()).reshape(len(at), *side)
    for k, block in enumerate(tool.blocks):
        for (r, c), effect in np.ndenumerate(effects[k]):
            values = {"block": block, "row": r, "column": c, "effect": float(effect)}
            rows.append(tool.at(tool.middle, kind="window", **values))
    share = tool.shares[tool.middle]
    found = [r["effect"] for r in rows if r["kind"] == "all" and r["share"] == share]
    words = ", ".join(f"{b}: {x:.2f}" for b, x in zip(tool.blocks, found, strict=True))
    line = f"recovered by all tokens after block {words}, at share {share:g} of the noise"
    return Finding({"patch": rows}, {"patch": effects}, line)


def _other_conditions(tool: Instrument) -> ConditionRows:
    """The text of the image before each, or another label than its own."""
    held, classes = tool.held, tool.c.data.num_classes
    if held.beside:
        return {name: np.roll(x, 1, axis=0) for name, x in held.conditions.items()}
    if classes < 2:
        raise UserError("patch compares two labels, and config.data.num_classes is 1.")
    rng = np.random.default_rng([tool.c.evaluate.seed, len(held)])
    other = (held.label + rng.integers(1, classes, len(held))) % classes
    return {"label": other.astype(np.int32)}


def _patch_effects(tool: Instrument) -> Callable[..., Any]:
    """(.., masks [K,L,N]) -> the two parts of each effect, [B,K] and [B] (`tokens.recovered`)."""

    @jax.jit
    def program(
        x0: Any, eps: Any, conditions: Any, other: Any, t: Any, params: Any, masks: Any
    ) -> Any:
        x_t = tool.noised(x0, eps, t)
        clean, taps = tool.observe(params, x_t, conditions, t, "tokens")
        corrupt, _ = tool.observe(params, x_t, other, t)

        def effect(mask: jax.Array) -> jax.Array:
            assert taps.tokens is not None
            out = tool.patched(params, x_t, other, t, mask[:, None], taps.tokens)
            return recovered(out, corrupt, clean)[0]

        whole = recovered(clean, corrupt, clean)[1]
        # A batch that is filled up has rows that no one asked for, and is cut behind.
        return jnp.moveaxis(jax.lax.map(effect, masks), 0, 1), whole

    return program


def _windows(h: int, w: int) -> np.ndarray:
    """Which tokens each of at most WINDOWS x WINDOWS windows holds -> bool[W,N]."""
    rows, columns = (np.arange(n) * min(n, WINDOWS) // n for n in (h, w))
    at = (rows[:, None] * min(w, WINDOWS) + columns[None]).reshape(-1)
    return np.asarray(at[None] == np.arange(min(h, WINDOWS) * min(w, WINDOWS))[:, None])


# ---- gates


def gates(tool: Instrument) -> Finding:
    """The rise of the loss when a branch of a block is closed, or held at its mean.

    Closed, a branch yields zero, as behind a gate of zero. Held, it yields its mean over images and
    tokens of the time.
    """
    loss, held, means_at = _held_loss(tool), tool.held, _branch_means(tool)
    rows: list[TableRow] = []
    branches = [(b, name) for b in tool.blocks for name in tool.inside.branches]
    half = np.arange(len(held)) % 2 == 0
    for i, t in enumerate(tool.times):
        means = means_at(t)
        zero = jax.tree.map(np.zeros_like, means)
        whole = loss(t, (), means)
        for kind in ("zero", "mean"):
            for block, name in branches:
                values = means if kind == "mean" else zero
                rise = loss(t, ((block, name),), values) - whole
                found = {"loss": whole.mean(), "rise": rise.mean()}
                found |= {"rise_half_1": rise[half].mean(), "rise_half_2": rise[~half].mean()}
                found = {key: float(value) for key, value in found.items()}
                rows.append(tool.at(i, kind=kind, block=block, branch=name, **found))

    def ranking(key: str) -> np.ndarray:
        of = {pair: [r[key] for r in rows if _closed(r) == pair] for pair in branches}
        return np.array([np.mean(each) for each in of.values()])

    agreement = "too few branches to rank"
    if len(branches) > 2:
        rank = spearman(ranking("rise_half_1"), ranking("rise_half_2"))
        agreement = f"the rankings of two halves of the images agree to Spearman {rank:.2f}"
    order = [branches[k] for k in np.argsort(ranking("rise"), kind="stable")]
    at = tool.times[tool.middle]
    closing = _closing(tool, lambda closed: float(loss(at, closed, zero).mean()), order)
    worst = order[-1]
    line = f"closing {worst[1]} of block {worst[0]} costs most; {agreement}"
    return Finding({"gates": rows, "gates_closed": closing}, {}, line)


def _closed(row: TableRow) -> tuple[int, str] | None:
    return (row["block"], row["branch"]) if row["kind"] == "zero" else None


def _held_loss(tool: Instrument) -> Callable[..., np.ndarray]:
    """(t, closed branches, their values) -> the mean square error of each held-out image, f64[n].

    Branches are arguments of one program.
    """
    transform = without_branches(tool.inside.branches, tool.inside.stack)

    @jax.jit
    def program(x0: Any, eps: Any, conditions: Any, t: Any, params: Any, base: Any) -> jax.Array:
        joined = transform.join(base, params)
        out, _ = tool.observe(joined, tool.noised(x0, eps, t), conditions, t)
        return jnp.square(out - tool.target(x0, eps, t)).mean((1, 2, 3))

    def loss(
        t: np.ndarray, closed: tuple[tuple[int, str], ...], values: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        base = {
            name: Held(
                np.array([(b + 1, name) not in closed for b in range(tool.inside.depth)]), value
            )
            for name, value in values.items()
        }
        held = tool.held
        found = tool.over(program, (held.x0, held.eps, held.conditions), t, tool.params, base)
        return np.asarray(found, np.float64)

    return loss


def _branch_means(tool: Instrument) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """t -> the mean of what each branch yields, over images and tokens, f32[L,D]."""

    @jax.jit
    def program(x0: Any, eps: Any, conditions: Any, t: Any, params: Any) -> Any:
        _, taps = tool.observe(params, tool.noised(x0, eps, t), conditions, t, "branches")
        return {
            name: jnp.moveaxis(x.astype(jnp.float32).mean(2), 0, 1)
            for name, x in taps.branches.items()
        }

    def means(t: np.ndarray) -> dict[str, np.ndarray]:
        fit = tool.fit
        found = tool.over(program, (fit.x0, fit.eps, fit.conditions), t, tool.params)
        return {name: np.asarray(x.mean(0), np.float32) for name, x in found.items()}

    return means


def _closing(
    tool: Instrument,
    loss: Callable[[tuple[tuple[int, str], ...]], float],
    order: list[tuple[int, str]],
) -> list[TableRow]:
    """The loss as more and more branches are closed, the least needed first, and in random order.

    At the middle time.
    """
    rng = np.random.default_rng(tool.c.evaluate.seed)
    orders = [("ranked", order)]
    orders += [
        (f"random {k + 1}", [order[j] for j in rng.permutation(len(order))]) for k in range(ORDERS)
    ]
    return [
        tool.at(tool.middle, kind=kind, closed=count, loss=loss(tuple(each[:count])))
        for kind, each in orders
        for count in range(len(each) + 1)
    ]


# ---- similarity


def similarity(tool: Instrument) -> Finding:
    """CKNNA of blocks with the features of clean images, if there are any, and of blocks."""
    program, held, extractor = _pooled(tool), tool.held, tool.extractor
    features = None
    if extractor is not None:
        images = np.clip(127.5 * held.image + 128, 0, 255).astype(np.uint8)
        features = extractor.extract(images).pool
    if len(held) <= NEIGHBOURS:
        raise UserError(f"cknna needs more than {NEIGHBOURS} held-out images: raise --num.")
    rows: list[TableRow] = []
    among: list[TableRow] = []
    for i, t in enumerate(tool.times):
        if features is None and i != tool.middle:
            continue
        batch = (held.x0, held.eps, tool.null_conditions(held))
        tokens, x_t = tool.over(program, batch, t, tool.params)
        each = [tokens[:, k] for k in range(len(tool.blocks))]
        if features is not None:
            for x, block in zip(each, tool.blocks, strict=True):
                value = cknna(x, features, NEIGHBOURS)
                rows.append(tool.at(i, kind="block", block=block, cknna=value))
            value = cknna(_numbers(x_t, tool.inside.grid), features, NEIGHBOURS)
            rows.append(tool.at(i, kind="pixels", cknna=value))
        if i == tool.middle:
            for x, block in zip(each, tool.blocks, strict=True):
                for y, other in zip(each, tool.blocks, strict=True):
                    value = cknna(x, y, NEIGHBOURS) if block <= other else float("nan")
                    among.append(tool.at(i, block=block, other=other, cknna=value))
    if features is None:
        line = "of blocks alone: config.evaluate.features is 'none', so there is nothing to compare"
        return Finding({"cknna_blocks": among}, {}, line)
    assert extractor is not None
    best = max((r for r in rows if r["kind"] == "block"), key=lambda r: r["cknna"])
    line = (
        f"most like the features {extractor.name!r} is block {best['block']} at share"
        f" {best['share']:g} of the noise: {best['cknna']:.3f}"
    )
    return Finding({"cknna": rows, "cknna_blocks": among}, {}, line)


# ---- correspondence


def correspondence(tool: Instrument) -> Finding:
    """DIFT: tokens of a warped copy are found again in the image by the largest cosine.

    Baselines are noisy pixels, the same place, and a token at random.
    """
    held, (h, w) = tool.held, tool.inside.grid
    rng = np.random.default_rng([tool.c.evaluate.seed, len(held)])
    warp = rng.uniform(-1, 1, (len(held), 4)).astype(np.float32)
    warped, source = (np.asarray(x) for x in warped_images(held.image, warp, (h, w)))
    x0, eps = tool.make(warped, 2)
    inside = ((source > -0.5) & (source < np.array([h, w]) - 0.5)).all(-1)
    valid = inside & _inked(warped, (h, w))
    if not valid.any():
        raise UserError("no token of the images differs from the rest: there is nothing to find.")
    program, rows = _matches(tool), []
    batch = (held.x0, held.eps, x0, eps, tool.null_conditions(held))

    def score(matches: np.ndarray) -> float:
        return float(correct_keypoints(matches, source, h, w)[valid].mean())

    for i, t in enumerate(tool.times):
        tokens, pixels = tool.over(program, batch, t, tool.params)
        for k, block in enumerate(tool.blocks):
            rows.append(tool.at(i, kind="block", block=block, pck=score(tokens[:, k])))
        rows.append(tool.at(i, kind="pixels", pck=score(pixels)))
    same = np.broadcast_to(np.arange(h * w), source.shape[:2])
    rows.append({"kind": "same place", "pck": score(same)})
    apart = np.linalg.norm(source[:, :, None] - places(h, w)[None, None], axis=-1) <= 1 + 1e-5
    rows.append({"kind": "random", "pck": float(apart.mean(-1)[valid].mean())})
    best = max((r for r in rows if r["kind"] == "block"), key=lambda r: r["pck"])
    others = max(r["pck"] for r in rows if r["kind"] != "block")
    line = (
        f"block {best['block']} at share {best['share']:g} of the noise finds {best['pck']:.3f} of"
        f" {int(valid.sum())} tokens within 1; the best baseline {others:.3f}"
    )
    return Finding({"correspondence": rows}, {}, line)


def warped_images(
    images: np.ndarray, draws: np.ndarray, grid: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Rotate, zoom and shift images f32[n,H,W,C] by draws f32[n,4] in [-1, 1], bilinearly.

    -> the warped images, and the place f32[n,N,2] in the image that each of their tokens shows.
    """
    n, H, W, C = images.shape
    angle, zoom = ROTATION * draws[:, 0], np.exp(ZOOM * draws[:, 1])
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    turn = np.stack([cos, sin, -sin, cos], axis=1).reshape(n, 2, 2)

    def origin(at: np.ndarray, side: np.ndarray) -> np.ndarray:
        centre = (side - 1) / 2
        moved = np.einsum("nij,pj->npi", turn, at - centre)
        return np.asarray(moved + centre + SHIFT * draws[:, None, 2:] * side)

    pixels = origin(places(H, W), np.array([H, W], np.float32))
    tokens = origin(places(*grid), np.array(grid, np.float32))

    @jax.jit
    def resample(images: jax.Array, at: jax.Array) -> jax.Array:
        one = functools.partial(jax.scipy.ndimage.map_coordinates, order=1, mode="nearest")

        def each(image: jax.Array, at: jax.Array) -> jax.Array:
            return jax.vmap(lambda x: one(x, list(at.T)), in_axes=-1, out_axes=-1)(image)

        return jax.vmap(each)(images, at).reshape(-1, H, W, C)

    return resample(jnp.asarray(images), jnp.asarray(pixels, jnp.float32)), jnp.asarray(tokens)


def _inked(images: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Which tokens show something: their pixels are far from the median -> bool[n,N]."""
    n, H, W, C = images.shape
    away = np.abs(images - np.median(images, axis=(1, 2), keepdims=True))
    cells = away.reshape(n, grid[0], H // grid[0], grid[1], W // grid[1], C).mean((2, 4, 5))
    return np.asarray(cells.reshape(n, -1) > INK)


def _matches(tool: Instrument) -> Callable[..., Any]:
    """-> the image's token that each token of the copy is most like: i[B,L,N], of pixels i[B,N]."""
    cell = tool.inside.shape[0] // tool.inside.grid[0]

    @jax.jit
    def program(
        x0: Any, eps: Any, warped: Any, warped_eps: Any, conditions: Any, t: Any, params: Any
    ) -> Any:
        x_t = [tool.noised(x0, eps, t), tool.noised(warped, warped_eps, t)]
        taps = [tool.observe(params, x, conditions, t, "tokens")[1].tokens for x in x_t]
        tokens = [x[tool.taken] for x in taps if x is not None]
        found = best_matches(tokens[1], tokens[0])
        pixels = best_matches(patchify(x_t[1], cell), patchify(x_t[0], cell))
        return jnp.moveaxis(found, 0, 1), pixels

    return program


# ---- words


class _Words(NamedTuple):
    """The maps of the words of images f32[n,N,M], each of which has 1 for its largest weight."""

    maps: np.ndarray
    live: np.ndarray  # bool[n,M]: where a token says something, and the image shows something
    region: np.ndarray  # bool[n,N]: the tokens that show something
    inside: np.ndarray  # f32[n,L,M]: the share of a block's weights that lies in the region
    pieces: np.ndarray  # str[n,M]


def words(tool: Instrument) -> Finding:
    """Where the image looks for each word of its text, beside where it shows something.

    Cross-attention as attribution (DAAM, Tang et al. 2022, arXiv:2210.04885). A word's map is the
    mean of its weights over blocks and heads. Above a threshold that is best for the word in
    training images, it overlaps with the tokens that show something. Baselines are the word's mean
    map over training images, the same for all, and the centre, each at its own best threshold.
    """
    if tool.inside.pieces is None:
        raise UserError(
            "--what=words: this network is given no tokens of a text: leave 'words' out."
        )
    program, rows, (h, w) = _word_maps(tool), [], tool.inside.grid
    sets = [(each, _inked(each.image, (h, w))) for each in (tool.fit, tool.held)]
    pictures = {}
    for i, t in enumerate(tool.times):
        fit, held = (_read_words(tool, program, *each, t) for each in sets)
        if not (fit.live.any() and held.live.any()):
            raise UserError("no token of the images differs from the rest: no map can be compared.")
        rows += [tool.at(i, **values) for values in _word_rows(tool, fit, held)]
        if i == tool.middle:
            maps = np.moveaxis(held.maps[:PICTURES], 1, 2)
            pictures = {
                "words": maps.reshape(*maps.shape[:2], h, w),
                "words_images": tool.held.image[:PICTURES],
            }
    pictured: list[TableRow] = [
        {"image": k + 1, "token": j + 1, "word": piece}
        for k, each in enumerate(tool.held.pieces[:PICTURES])
        for j, piece in enumerate(each)
        if piece
    ]
    share = tool.shares[tool.middle]
    here = [row for row in rows if row["share"] == share]
    overlap = {row["kind"]: row.get("iou") for row in here}
    best = sorted((r for r in here if r["kind"] == "word"), key=lambda r: -r["iou"])[:3]
    line = (
        f"maps of words overlap with what is shown by {overlap['map']:.3f} at share {share:g} of"
        f" the noise, best of {', '.join(repr(row['word']) for row in best)}; one map for all"
        f" images {overlap['same map']:.3f}, the centre {overlap['centre']:.3f}"
    )
    return Finding({"words": rows, "words_pictured": pictured}, pictures, line)


def _word_rows(tool: Instrument, fit: _Words, held: _Words) -> Iterator[TableRow]:
    """The rows of a time: of all words, of baselines, of blocks, and of each word."""
    h, w = tool.inside.grid
    away = np.square(places(h, w) - (np.array([h, w]) - 1) / 2).sum(-1)
    centre = np.exp(-away / (2 * (min(h, w) / 4) ** 2))[None, :, None]
    overlap = _overlap(fit, held, fit.maps, held.maps)
    yield {"kind": "map", "iou": float(overlap[held.live].mean())}
    for kind, maps in (
        ("same map", _same_maps(fit, held)),
        ("centre", [np.broadcast_to(centre, each.maps.shape) for each in (fit, held)]),
    ):
        yield {"kind": kind, "iou": float(_overlap(fit, held, *maps)[held.live].mean())}
    for k, block in enumerate(tool.blocks):
        inside = float(held.inside[:, k][held.live].mean())
        yield {"kind": "block", "block": block, "inside": inside}
    shown = np.broadcast_to(held.region.mean(-1)[:, None], held.live.shape)
    yield {"kind": "uniform", "inside": float(shown[held.live].mean())}
    for word in np.unique(held.pieces[held.live]):
        at = held.live & (held.pieces == word)
        values = {"iou": overlap[at].mean(), "inside": held.inside.mean(1)[at].mean()}
        numbers = {name: float(value) for name, value in values.items()}
        yield {"kind": "word", "word": str(word), "images": int(at.sum()), **numbers}


def _word_maps(tool: Instrument) -> Callable[..., Any]:
    """-> weights of the tokens of a text, of blocks and heads f32[B,N,M], and inside f32[B,L,M]."""

    @jax.jit
    def program(x0: Any, eps: Any, conditions: Any, region: Any, t: Any, params: Any) -> Any:
        _, taps = tool.observe(params, tool.noised(x0, eps, t), conditions, t, "crossed")
        assert taps.crossed is not None
        M = conditions["context"].shape[1]
        weights = taps.crossed[tool.taken].mean(2)[..., -M:]  # [L,B,N,M]
        shown = jnp.einsum("lbnm,bn->blm", weights, region.astype(jnp.float32))
        total = jnp.maximum(jnp.moveaxis(weights.sum(2), 0, 1), jnp.finfo(jnp.float32).tiny)
        return weights.mean(0), shown / total

    return program


def _read_words(
    tool: Instrument,
    program: Callable[..., Any],
    examples: Examples,
    region: np.ndarray,
    t: np.ndarray,
) -> _Words:
    """The maps of the words of examples at a time; region bool[n,N]: tokens that show something."""
    batch = (examples.x0, examples.eps, examples.conditions, region)
    maps, inside = tool.over(program, batch, t, tool.params)
    pieces = np.array([list(each) for each in examples.pieces])
    live = (pieces != "") & examples.conditions["context_mask"].astype(bool)
    live &= region.any(-1, keepdims=True)
    most = np.maximum(maps.max(1, keepdims=True), np.finfo(np.float32).tiny)
    return _Words(maps / most, live, region, inside, pieces)


def _same_maps(fit: _Words, held: _Words) -> tuple[np.ndarray, np.ndarray]:
    """For each word its mean map over training images, or of a word that is not there, of all."""
    every = np.moveaxis(fit.maps, 1, 2)
    whole = every[fit.live].mean(0)
    means = {
        word: every[fit.live & (fit.pieces == word)].mean(0)
        for word in np.unique(fit.pieces[fit.live])
    }

    def of(words: _Words) -> np.ndarray:
        found = np.stack([[means.get(word, whole) for word in row] for row in words.pieces])
        return np.moveaxis(found / found.max(-1, keepdims=True), 2, 1)

    return of(fit), of(held)


def _overlap(fit: _Words, held: _Words, of_fit: np.ndarray, of_held: np.ndarray) -> np.ndarray:
    """The overlaps f64[n,M] of maps with regions, above the threshold that is best for `fit`.

    Each word has its own; one that `fit` does not have takes the best of all.
    """
    of_training = np.stack([overlaps(of_fit >= each, fit.region) for each in THRESHOLDS])
    every = int(np.argmax(of_training[:, fit.live].mean(-1)))
    chosen = np.full(held.pieces.shape, every)
    for word in np.unique(fit.pieces[fit.live]):
        score = of_training[:, fit.live & (fit.pieces == word)].mean(-1)
        chosen[held.pieces == word] = int(np.argmax(score))
    found = np.stack([overlaps(of_held >= each, held.region) for each in THRESHOLDS])
    return np.asarray(np.take_along_axis(found, chosen[None], axis=0)[0])


# --what of the command
ANALYSES: Mapping[str, Callable[[Instrument], Finding]] = {
    "probe": probe,
    "attention": self_attention,
    "lens": lens,
    "patch": patch,
    "gates": gates,
    "cknna": similarity,
    "correspondence": correspondence,
    "words": words,
}


def analyses_of(tool: Instrument) -> tuple[str, ...]:
    """The names of the analyses that a network can be given."""
    texts = tool.inside.pieces is not None
    return tuple(name for name in ANALYSES if texts or name != "words")
