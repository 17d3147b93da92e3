"""python -m ditjax.plan: what a recipe needs on a machine that is not here, and what it costs."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditjax import cli
from ditjax.config import Config, changed
from ditjax.errors import UserError, divisors
from ditjax.files.atomic import write_json
from ditjax.machines import planning, roofline
from ditjax.machines import topology as machines
from ditjax.machines.plan_text import memory_words, mesh_words, plan_text, search_text
from ditjax.machines.topology import Topology
from ditjax.models.cost import trainable_parameters
from ditjax.runs.provenance import commit, typed
from ditjax.tasks import build, programs

PLAN_FILE = "plan.json"
REMATS = ("none", "dots", "full")


def main(argv: list[str]) -> int:
    """The command: 0 when it fits, 1 when it does not."""
    parser = cli.parser(
        "plan",
        "Compiles the real train step for TPUs or GPUs that are not here: memory, collectives, time"
        " and cost. Status 0 when it fits, 1 when it does not.",
    )
    parser.add_argument(
        "--topology", required=True, help="CHIP:SHAPE of a slice, such as v5e:16x16 or h100:8"
    )
    parser.add_argument("--mesh", default="", help="data=16,fsdp=16: short for --config.mesh.*")
    parser.add_argument("--steps", type=int, default=0, help="of the cost; 0: the recipe's")
    parser.add_argument("--out", default="", help=f"folder for {PLAN_FILE}, and of what compiled")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, remat and batches, and rank them"
    )
    parser.add_argument("--limit", type=int, default=12, help="of --search: compilations")
    parser.add_argument(
        "--batches", default="", help="of --search: 512,1024; default the recipe's, 2x and 4x"
    )
    args, c = cli.parse(parser, [*argv, *_mesh_flags(parser.parse_known_args(argv)[0].mesh)])
    if args.steps < 0 or args.limit < 1:
        raise UserError(
            f"--steps={args.steps} --limit={args.limit}: expected steps of 0 or more and a limit of"
            " at least 1."
        )
    topology = machines.parse(args.topology)
    steps = args.steps or c.train.steps
    out = Path(args.out) if args.out else None
    cache = out / "compiled" if out else None
    command = typed("plan", argv, drop=("--out",))
    if args.search:
        return _search(c, topology, steps, args, cache, out, command)
    plan = {"command": command, "commit": commit(), **planning.make_plan(c, topology, steps, cache)}
    if not args.json:
        print(plan_text(plan), flush=True)
    if not plan["memory"]["fits"]:
        plan["smallest"] = smallest_that_fits(c, topology, steps, cache)
        if not args.json:
            print(_smallest_words(plan["smallest"], topology))
    if args.json:
        print(json.dumps(plan, indent=1))
    if out:
        write_json(out / PLAN_FILE, plan)
    return 0 if plan["memory"]["fits"] else 1


def _mesh_flags(text: str) -> list[str]:
    """'data=16,fsdp=16' -> ['--config.mesh.data=16', '--config.mesh.fsdp=16']."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if "=" not in word:
            raise UserError(f"--mesh={text}: {word!r} is no AXIS=SIZE, such as data=16,fsdp=16.")
    return [f"--config.mesh.{word}" for word in words]


def smallest_that_fits(
    c: Config, topology: Topology, steps: int, cache: Path | None
) -> dict[str, Any] | None:
    """The plan on the smallest slice, from this one on, that the recipe's batch fits, if any.

    On each slice the mesh that splits the state most is tried: fsdp as large as the network and
    the batch allow, data the rest; the other axes and remat are the recipe's.
    """
    tried = build.mesh(c, machines.devices(topology, c.mesh.slices)).shape
    for larger in [topology, *topology.larger()]:
        candidate = most_sharded(c, larger)
        if candidate is None:
            continue
        if build.mesh(candidate, machines.devices(larger, c.mesh.slices)).shape == tried:
            continue
        plan = planning.make_plan(candidate, larger, steps, cache, hopeless=False)
        if plan["memory"]["fits"]:
            return plan
    return None


def most_sharded(c: Config, topology: Topology) -> Config | None:
    """The recipe with the largest legal fsdp on a topology, or None."""
    rest = c.mesh.tensor * c.mesh.context
    count = topology.chips * topology.chip.cores
    for fsdp in reversed(divisors(count // rest) if count % rest == 0 else []):
        candidate = changed(c, {"mesh": {"data": count // rest // fsdp, "fsdp": fsdp}})
        if not why_illegal(candidate, topology):
            return candidate
    return None


def why_illegal(c: Config, topology: Topology) -> str:
    """What the rules say against a recipe's mesh on a topology, or ''."""
    try:
        mesh = build.mesh(c, machines.devices(topology, c.mesh.slices))
        programs.training(c, mesh)
    except UserError as error:
        return str(error)
    return ""


def _smallest_words(plan: dict[str, Any] | None, topology: Topology) -> str:
    if plan is None:
        return (
            f"no shape of {topology.chip.name} from this one on fits it as it is: try"
            " --config.model.remat=full, more microbatches or a smaller batch, or --search"
        )
    return (
        f"smallest {topology.chip.name} that does: {plan['topology']},"
        f" {plan['chips']} chips, mesh {mesh_words(plan['mesh'])}: {memory_words(plan)}"
    )


def candidates(c: Config, topology: Topology, batches: Sequence[int]) -> Iterator[Config]:
    """Every mesh of powers of two over data, fsdp and tensor, remat and batch, likely ones first.

    The order is by a closed form: products as remat repeats them, and what ideal FSDP and the
    gradients' all-reduce over data send.
    """
    count = topology.chips * topology.chip.cores
    shape = build.cost(c)
    chip = topology.chip
    found = []
    for tensor, fsdp in itertools.product((1, 2, 4), divisors(count)):
        if count % (tensor * fsdp * c.mesh.context):
            continue
        data = count // (tensor * fsdp * c.mesh.context)
        parameters = trainable_parameters(shape) / tensor
        wire = roofline.fsdp_bytes(parameters, fsdp)
        wire += 4 * parameters / fsdp * (data - 1) / data
        for remat, batch in itertools.product(REMATS, batches):
            # Activations of width D cross `tensor` twice a block in either direction.
            crossing = 8 * 2 * shape.tokens * shape.size.width * shape.size.depth * batch / count
            seconds = roofline.hardware_flops(shape, batch, remat) / (
                count * chip.rates.device_flops(c.model.dtype, c.model.matmul)
            ) + (wire + crossing * tensor * (tensor - 1) / tensor) / (2e9 * chip.link_gb_s)
            changes = {
                "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
                "model": {"remat": remat},
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
        print(search_text(ranked, list(skipped)))
    return 0 if ranked and ranked[0]["memory"]["fits"] else 1


def _hopeless(c: Config, plans: Sequence[Mapping[str, Any]]) -> str:
    """Why a candidate needs no compilation, after those that did not fit; '' where it does.

    What is alive of the activations is the same on any mesh with its `tensor`, and not less with
    weaker remat or a larger batch. It is what a plan needed beyond its state, the gradient and
    gathered parameters being left out: 8 bytes a parameter.
    """
    for plan in plans:
        memory, tensor = plan["memory"], plan["mesh"]["tensor"]
        rest = memory["peak_bytes"] - memory["state_bytes"] - 8 * plan["parameters"] / tensor
        if (
            c.mesh.tensor == tensor
            and REMATS.index(c.model.remat) <= REMATS.index(plan["remat"])
            and c.train.batch_size >= plan["batch_size"]
            and rest > memory["hbm_bytes"]
        ):
            return (
                f"remat {c.model.remat} with batch {c.train.batch_size}: the activations alone do"
                f" not fit, as remat {plan['remat']} with batch {plan['batch_size']} has shown"
            )
    return ""


def _rank(plan: dict[str, Any]) -> tuple[bool, float]:
    """Those that fit first, by seconds an image with nothing hidden."""
    if "roofline" not in plan:
        return True, plan["memory"]["peak_bytes"]
    rate = plan["roofline"]["images_a_second"]["sequential"]
    return not plan["memory"]["fits"], -rate


if __name__ == "__main__":
    cli.run(main)
