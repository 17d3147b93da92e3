"""python -m ditjax.plan: memory, speed and cost of a recipe on a machine that is not at hand."""

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditjax import cli
from ditjax.config import Config, changed
from ditjax.errors import UserError, divisors
from ditjax.evaluation.features import planned_features
from ditjax.files.atomic import write_json
from ditjax.machines import planning, roofline
from ditjax.machines import topology as machines
from ditjax.machines.plan_text import (
    format_plan,
    format_search,
    format_stages,
    memory_words,
    mesh_words,
)
from ditjax.machines.stages import planned_cost, stage_hours, stages_of
from ditjax.machines.topology import Topology
from ditjax.parallel.mesh import mesh_of
from ditjax.runs.provenance import commit, typed
from ditjax.tasks import make_task
from ditjax.training.program import training

PLAN_FILE = "plan.json"
REMATS = ("none", "dots", "full")


def _parser() -> cli.Parser:
    parser = cli.parser(
        "plan",
        "Compile the real train step, or the sampler, for TPUs or GPUs that are not at hand, and"
        " print memory, collectives, time and cost; and what training, sampling, evaluation and"
        " encoding cost in closed form. The exit status is 0 if it fits, 1 if it does not.",
    )
    parser.add_argument(
        "--topology", required=True, help="CHIP:SHAPE of one slice, such as v5e:16x16 or h100:8"
    )
    parser.add_argument(
        "--mesh", default="", help="such as data=16,fsdp=16; abbreviates --config.mesh.*"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="steps to cost (default: the recipe's)"
    )
    parser.add_argument(
        "--price", type=float, default=0.0, help="of a chip-hour, in any currency, for the cost"
    )
    parser.add_argument(
        "--compile",
        choices=("train", "sample", "none"),
        default="train",
        help="the program to compile; none: closed form alone, without the machine's compiler",
    )
    parser.add_argument(
        "--share", type=float, default=0.4, help="of the products' peak, for the closed form"
    )
    parser.add_argument(
        "--images", type=int, default=0, help="of the data set, for the cost of encode"
    )
    parser.add_argument("--out", default="", help=f"folder for {PLAN_FILE} and compiled results")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--search", action="store_true", help="try and rank meshes, remat and batch sizes"
    )
    parser.add_argument(
        "--limit", type=int, default=12, help="with --search: compile at most this many plans"
    )
    parser.add_argument(
        "--batches",
        default="",
        help="with --search: batch sizes, such as 512,1024 (default: the recipe's, 2x and 4x)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command: return 0 if the recipe fits, 1 if it does not."""
    parser = _parser()
    args, c = cli.parse(parser, [*argv, *_mesh_flags(parser.parse_known_args(argv)[0].mesh)])
    if not args.search:
        cli.check_unused(parser, argv, ["limit", "batches"], "without --search")
    if not 0 <= args.price < 1e6:
        raise UserError(f"--price={args.price:g}: expected the price of a chip-hour.")
    if args.search:
        unused = ["price", "compile", "share", "images"]
        cli.check_unused(parser, argv, unused, "with --search")
    if not 0 < args.share <= 1 or args.images < 0:
        raise UserError(
            f"--share={args.share:g} --images={args.images}: expected a share above 0 and at most"
            " 1, and a number of images."
        )
    if args.steps < 0 or args.limit < 1:
        raise UserError(
            f"--steps={args.steps} --limit={args.limit}: expected steps of 0 or more and a limit of"
            " at least 1."
        )
    topology = machines.parse_topology(args.topology)
    steps = args.steps or c.train.steps
    out = Path(args.out) if args.out else None
    cache = out / "compiled" if out else None
    command = typed("plan", argv, drop=("--out",))
    if args.search:
        return _search(c, topology, steps, args, cache, out, command)
    stages = _stages(c, topology, steps, args)  # first: it takes seconds, and may raise
    plan = {"command": command, "commit": commit(), **_compiled_plan(c, topology, steps, args)}
    if args.price and "cost" in plan:
        plan["cost"]["price_a_chip_hour"] = args.price
    if not args.json and "memory" in plan:
        print(format_plan(plan) + "\n", flush=True)
    plan |= stages
    if not args.json:
        print(format_stages(plan), flush=True)
    fits = "memory" not in plan or plan["memory"]["fits"]
    if not fits and args.compile == "train":
        plan["smallest"] = smallest_that_fits(c, topology, steps, cache)
        if not args.json:
            print(_smallest_text(plan["smallest"], topology))
    if args.json:
        print(json.dumps(plan, indent=1))
    if out:
        write_json(out / PLAN_FILE, plan)
    return 0 if fits else 1


def _compiled_plan(c: Config, topology: Topology, steps: int, args: Any) -> dict[str, Any]:
    """The plan of the program that --compile names; of none the machine alone."""
    cache = Path(args.out) / "compiled" if args.out else None
    if args.compile == "train":
        return planning.make_plan(c, topology, steps, cache)
    if args.compile == "sample":
        return planning.make_sampler_plan(c, topology, cache)
    return {"topology": topology.name, "chips": topology.chips * c.mesh.slices}


def _stages(c: Config, topology: Topology, steps: int, args: Any) -> dict[str, Any]:
    """The stages of a recipe at a share of the peak."""
    features = functools.partial(planned_features, c.evaluate.features)
    found = stages_of(c, steps, args.images or None, features)
    stages = stage_hours(c, found, topology, args.share)
    return {"stages": stages, "share": args.share, "price_a_chip_hour": args.price}


def _mesh_flags(text: str) -> list[str]:
    """'data=16,fsdp=16' -> ['--config.mesh.data=16', '--config.mesh.fsdp=16']."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if "=" not in word:
            raise UserError(f"--mesh={text}: {word!r}: expected AXIS=SIZE, such as data=16.")
    return [f"--config.mesh.{word}" for word in words]


def smallest_that_fits(
    c: Config, topology: Topology, steps: int, cache: Path | None
) -> dict[str, Any] | None:
    """Return the plan on the smallest slice, from this one on, that the recipe fits, or None.

    On each slice the mesh that splits the state most is tried: fsdp as large as the network and the
    batch allow, and data the rest. The other axes and remat are the recipe's.
    """
    tried = mesh_of(c, machines.devices(topology, c.mesh.slices)).shape
    for larger in [topology, *topology.larger()]:
        candidate = most_sharded(c, larger)
        if candidate is None:
            continue
        if mesh_of(candidate, machines.devices(larger, c.mesh.slices)).shape == tried:
            continue
        plan = planning.make_plan(candidate, larger, steps, cache, hopeless=False)
        if plan["memory"]["fits"]:
            return plan
    return None


def most_sharded(c: Config, topology: Topology) -> Config | None:
    """Return the recipe with the largest legal fsdp on a topology, or None."""
    rest = c.mesh.tensor * c.mesh.context
    count = topology.chips * topology.chip.cores
    for fsdp in reversed(divisors(count // rest) if count % rest == 0 else []):
        candidate = changed(c, {"mesh": {"data": count // rest // fsdp, "fsdp": fsdp}})
        if not mesh_error(candidate, topology):
            return candidate
    return None


def mesh_error(c: Config, topology: Topology) -> str:
    """Return the error of a recipe's mesh on a topology, or '' if it is legal."""
    try:
        mesh = mesh_of(c, machines.devices(topology, c.mesh.slices))
        training(c, make_task(c, mesh), mesh)
    except UserError as error:
        return str(error)
    return ""


def _smallest_text(plan: dict[str, Any] | None, topology: Topology) -> str:
    if plan is None:
        return (
            f"the recipe fits no shape of {topology.chip.name} from this one on: try"
            " --config.model.remat=full, more microbatches or a smaller batch, or --search"
        )
    return (
        f"smallest {topology.chip.name} that fits: {plan['topology']},"
        f" {plan['chips']} chips, mesh {mesh_words(plan['mesh'])}: {memory_words(plan)}"
    )


def candidates(c: Config, topology: Topology, batches: Sequence[int]) -> Iterator[Config]:
    """Yield every mesh over data, fsdp and tensor with each remat and batch, the best first.

    They are sorted by a closed form of the time per image: the products, including those that remat
    repeats, and the bytes of ideal FSDP and of the gradients' all-reduce over data.
    """
    count = topology.chips * topology.chip.cores
    remats = REMATS if hasattr(c.model, "remat") else REMATS[:1]
    tried = {remat: {"remat": remat} if hasattr(c.model, "remat") else {} for remat in remats}
    costs = {remat: planned_cost(changed(c, {"model": tried[remat]})) for remat in remats}
    cost = costs[REMATS[0]]
    # Activations of width D cross `tensor` twice a block in either direction.
    blocks = [cost.description.get(name, 0) for name in ("width", "depth")]
    crossing_an_image = 8 * 2 * cost.tokens * math.prod(blocks) / count
    chip = topology.chip
    found = []
    for tensor, fsdp in itertools.product((1, 2, 4), divisors(count)):
        if count % (tensor * fsdp * c.mesh.context):
            continue
        data = count // (tensor * fsdp * c.mesh.context)
        parameters = cost.parameters / tensor
        wire = roofline.fsdp_bytes(parameters, fsdp)
        wire += 4 * parameters / fsdp * (data - 1) / data
        for remat, batch in itertools.product(remats, batches):
            crossing = crossing_an_image * batch
            seconds = roofline.hardware_flops(costs[remat], batch) / (
                count * chip.rates.device_flops(c.model.dtype, c.model.matmul)
            ) + (wire + crossing * tensor * (tensor - 1) / tensor) / (2e9 * chip.link_gb_s)
            changes = {
                "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
                "model": tried[remat],
                "train": {"batch_size": batch},
            }
            found.append((seconds / batch, changes))
    for _, changes in sorted(found, key=lambda each: each[0]):
        yield changed(c, changes)


def _search(
    c: Config,
    topology: Topology,
    steps: int,
    args: Any,
    cache: Path | None,
    out: Path | None,
    command: str,
) -> int:
    if args.batches:
        try:
            batches = [int(word) for word in args.batches.split(",")]
        except ValueError:
            raise UserError(f"--batches={args.batches}: expected sizes such as 512,1024.") from None
    else:
        batches = [c.train.batch_size * n for n in (1, 2, 4)]
    plans: list[dict[str, Any]] = []
    skipped: dict[str, None] = {}
    for candidate in candidates(c, topology, batches):
        if len(plans) == args.limit:
            break
        if why := _hopeless(candidate, plans):
            skipped[why] = None
            continue
        try:
            plan = planning.make_plan(candidate, topology, steps, cache, hopeless=False)
        except UserError as error:
            skipped[str(error)] = None
            continue
        if plan["memory"]["state_only"]:
            skipped[f"mesh {mesh_words(plan['mesh'])}: {memory_words(plan)}"] = None
            continue
        plans.append(plan)
    ranked = sorted(plans, key=_rank)
    found = {
        "command": command,
        "commit": commit(),
        "label": planning.LABEL,
        "search": ranked,
        "skipped": list(skipped),
    }
    if out:
        write_json(out / PLAN_FILE, found)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(format_search(ranked, list(skipped)))
    return 0 if ranked and ranked[0]["memory"]["fits"] else 1


def _hopeless(c: Config, plans: Sequence[Mapping[str, Any]]) -> str:
    """Return why a candidate cannot fit, given the plans that do not fit, or ''.

    The live activations are the same on any mesh with the same `tensor`, and not smaller with
    weaker remat or a larger batch. They are what a plan needs beyond the state and frozen weights,
    and beyond the gradient and the gathered parameters, which are 8 bytes per parameter.
    """
    remat = getattr(c.model, "remat", REMATS[0])
    for plan in plans:
        memory, tensor = plan["memory"], plan["mesh"]["tensor"]
        held = memory["state_bytes"] + memory["frozen_bytes"]
        rest = memory["peak_bytes"] - held - 8 * plan["parameters"] / tensor
        if (
            c.mesh.tensor == tensor
            and REMATS.index(remat) <= REMATS.index(plan["remat"])
            and c.train.batch_size >= plan["batch_size"]
            and rest > memory["hbm_bytes"]
        ):
            return (
                f"remat {remat} with batch {c.train.batch_size}: the activations alone do"
                f" not fit, as with remat {plan['remat']} and batch {plan['batch_size']}"
            )
    return ""


def _rank(plan: dict[str, Any]) -> tuple[bool, float]:
    """Sort key: plans that fit first, then images per second without overlap."""
    if "roofline" not in plan:
        return True, plan["memory"]["peak_bytes"]
    rate = plan["roofline"]["images_a_second"]["sequential"]
    return not plan["memory"]["fits"], -rate


if __name__ == "__main__":
    cli.run(main)
