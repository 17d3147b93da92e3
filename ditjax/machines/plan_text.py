"""Plans as text: memory, collectives, roofline and cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from ditjax.machines.chips import GIB
from ditjax.studies.words import aligned, count, number, plural, short

PLAN_ASSUMPTIONS = (
    "no step is faster than 'at best', where products, memory and links run at their peaks and at"
    " once; 'nothing hidden' adds the links' time to the rest",
    "products: model FLOPs are 6 a multiply-accumulate of a forward pass (MFU), and what remat"
    " repeats on top (step time)",
    "memory: state and temporaries are read and written once, the least possible",
    "links: ring collectives over every link that a group spans, one after another, no latency",
    "not counted: input, host, checkpoints, restarts",
)
STAGE_ASSUMPTIONS = (
    "closed form: products alone, at the share of their peak that was given, on all chips; train is"
    " 3 forward passes, or as many as its loss takes",
    "counted in the traced program: all products of the real program, on no machine; a branch"
    " counts as its costliest side",
    "not counted: memory traffic, links, features of small classifiers, files",
)


def format_plan(plan: Mapping[str, Any]) -> str:
    """The full text of one plan."""
    chip_hbm = plan["memory"]["hbm_bytes"] / GIB
    precision = f"{plan['dtype']}, remat {plan['remat']}"
    if plan["microbatches"] > 1:
        precision += f", {plan['microbatches']} microbatches"
    slices = f"{plan['slices']} slices, " if plan["slices"] > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    lines = [
        f"{plan['model']}: {count(plan['parameters'])} parameters, {plan['tokens']} tokens;"
        f" batch {plan['batch_size']}, {precision}",
        f"{plan['topology']}: {slices}{plural(plan['chips'], 'chip')}, {chip_hbm:.2f} GiB a device;"
        f" mesh {mesh_words(plan['mesh'])}",
        f"{plan['label']} ({plan['compile_seconds']:.0f} s): {versions}",
        "",
        memory_words(plan),
    ]
    if rollout := plan.get("rollout"):
        lines.append(
            f"rollout: {number(rollout['drawn_passes'])} of {number(rollout['passes'])} forward"
            f" passes an example draw what the reward is given: {rollout['drawn_flops']:.3g}"
            f" FLOPs a step, {rollout['share']:.0%} of its products"
        )
    if "roofline" in plan:
        lines += ["", *_collectives(plan), "", *_roofline(plan), "", *_cost(plan)]
    return "\n".join(lines)


def format_stages(plan: Mapping[str, Any]) -> str:
    """The stages of a plan as a table, and what they assume."""
    price = plan["price_a_chip_hour"]
    head = ["stage", "one", "Gflops", "times", "hours", "chip-hours", "price", "from"]
    rows = [head]
    for each in plan["stages"]:
        hours = each["hours"]
        chip_hours = None if hours is None else hours * plan["chips"]
        rows.append(
            [
                each["name"],
                each["item"],
                number(each["gflops"]),
                "-" if each["number"] is None else f"{each['number']:,}",
                number(hours),
                number(chip_hours),
                number(chip_hours * price) if price and chip_hours is not None else "-",
                short(each["source"], 120),
            ]
        )
    if not price:
        rows = [[*row[:6], row[7]] for row in rows]
    numeric = [False, False, *[True] * (len(rows[0]) - 3), False]
    return "\n".join(
        [
            f"on {plan['topology']}, {plural(plan['chips'], 'chip')}, at {plan['share']:.0%} of the"
            " products' peak (not run):",
            *aligned(rows, numeric),
            *(f"  - {text}" for text in STAGE_ASSUMPTIONS),
        ]
    )


def mesh_words(mesh: Mapping[str, int]) -> str:
    """'data=16 fsdp=16': the axes longer than 1."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "of one device"


def memory_words(plan: Mapping[str, Any]) -> str:
    """Whether a plan fits the memory, and by how much."""
    memory = plan["memory"]
    peak, hbm, state, frozen = (
        memory[f"{key}_bytes"] / GIB for key in ("peak", "hbm", "state", "frozen")
    )
    if memory["state_only"]:
        return (
            f"does not fit: the state alone, parameters, average and moments, is {state:.2f} GiB of"
            f" {hbm:.2f} GiB a device, over by {state - hbm:.2f} GiB"
        )
    of_which = {"weights": "the weights are"}.get(memory.get("holds", ""), "the state is")
    of_which += f" {state:.2f}" + (f" and frozen weights {frozen:.2f}" if frozen >= 0.005 else "")
    if memory["fits"]:
        said = f"fits: {peak:.2f} of {hbm:.2f} GiB a device ({peak / hbm:.0%}), of which {of_which}"
    else:
        said = (
            f"does not fit: {peak:.2f} of {hbm:.2f} GiB a device, over by {peak - hbm:.2f} GiB"
            f" ({of_which})"
        )
    unknown = memory["frozen_unknown"]
    return said + (f"; frozen weights are not counted: {unknown}" if unknown else "")


def _collectives(plan: Mapping[str, Any]) -> list[str]:
    rows = [["collective", "over", "group", "calls", "MB sent", "ms"]]
    rows += [
        [
            row["type"],
            "+".join(row["axes"]),
            str(row["group"]),
            str(row["calls"]),
            f"{row['wire_bytes'] / 1e6:.1f}",
            f"{row['seconds'] * 1e3:.2f}",
        ]
        for row in plan["collectives"]
        if row["wire_bytes"] >= 5e4
    ]
    fsdp = plan["mesh"]["fsdp"]
    total = (
        f"a device sends {plan['wire_bytes'] / 1e9:.2f} GB a step,"
        f" {plan['wire_bytes_a_parameter']:.2f} bytes a parameter"
    )
    if fsdp > 1:
        total += (
            f"; ideal FSDP in {plan['dtype']}, {3 * (2 if plan['dtype'] == 'bfloat16' else 4)}"
            f"(g-1)/g for g = {fsdp}, is {plan['ideal_fsdp_bytes_a_parameter']:.2f}"
        )
    lines = [*aligned(rows, [False, False, True, True, True, True]), total]
    share = plan["gradients_by_reduce_scatter"]
    if share is not None:
        lines.append(f"gradients over fsdp: {share:.0%} by reduce-scatter, the rest by all-reduce")
    return lines


def _roofline(plan: Mapping[str, Any]) -> list[str]:
    r = plan["roofline"]
    peak = r["peak_flops_a_device"] / 1e12
    lines = [
        f"roofline, ms a step: products {r['compute_seconds'] * 1e3:.1f} (at {peak:.0f} TFLOP/s a"
        f" device), memory {r['memory_seconds'] * 1e3:.1f}, links {r['wire_seconds'] * 1e3:.1f}"
    ]
    for name, words in (("overlapped", "at best"), ("sequential", "nothing hidden")):
        lines.append(
            f"{words:<15} {r['step_seconds'][name] * 1e3:.1f} ms a step"
            f"  {number(r['images_a_second'][name])} images/s  MFU at most {r['mfu'][name]:.0%}"
        )
    return lines


def _cost(plan: Mapping[str, Any]) -> list[str]:
    hours, chip_hours = plan["cost"]["hours"], plan["cost"]["chip_hours"]
    best, worst = "overlapped", "sequential"
    lines = [
        f"{plan['steps']:,} steps on {plural(plan['chips'], 'chip')}: {number(hours[best])} h at"
        f" best, {number(hours[worst])} h with nothing hidden: {number(chip_hours[best])} to"
        f" {number(chip_hours[worst])} chip-hours",
        *_price(plan["cost"]),
        "assumed:",
    ]
    return lines + [f"  - {text}" for text in PLAN_ASSUMPTIONS]


def _price(cost: Mapping[str, Any]) -> list[str]:
    """What the chip-hours cost, if a price was given."""
    if not (price := cost.get("price_a_chip_hour")):
        return []
    low, high = (number(cost["chip_hours"][name] * price) for name in ("overlapped", "sequential"))
    return [f"{low} to {high} at {price:g} a chip-hour, the price that was given"]


def format_search(plans: Sequence[Mapping[str, Any]], skipped: Sequence[str]) -> str:
    """A table of ranked plans, and the reasons why others were not compiled."""
    rows = [
        ["", "mesh", "remat", "batch", "GiB", "step ms", "to", "images/s", "MFU", "GB sent", ""]
    ]
    for place, plan in enumerate(plans, start=1):
        fits = plan["memory"]["fits"]
        cells = [
            str(place),
            mesh_words(plan["mesh"]),
            plan["remat"],
            str(plan["batch_size"]),
            f"{plan['memory']['peak_bytes'] / GIB:.2f}",
        ]
        if "roofline" in plan:
            r = plan["roofline"]
            cells += [
                f"{r['step_seconds']['overlapped'] * 1e3:.1f}",
                f"{r['step_seconds']['sequential'] * 1e3:.1f}",
                number(r["images_a_second"]["sequential"]),
                f"{r['mfu']['sequential']:.0%}",
                f"{plan['wire_bytes'] / 1e9:.2f}",
            ]
        else:
            cells += ["-"] * 5
        rows.append([*cells, "" if fits else "does not fit"])
    numeric = [True, False, False, True, True, True, True, True, True, True, False]
    lines = aligned(rows, numeric)
    if plans:
        first = plans[0]
        lines += [
            "",
            f"{first['label']}; {first['memory']['hbm_bytes'] / GIB:.2f} GiB a device. Ranked by"
            " images/s with nothing hidden, as are images/s and MFU; step ms from at best to that.",
        ]
    if skipped:
        lines += ["", f"not compiled ({len(skipped)}):", *(f"  - {why}" for why in skipped)]
    return "\n".join(lines)
