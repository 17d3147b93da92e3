"""python -m ditjax.flops: print parameters and Gflops of the paper's 12 models or of a recipe."""

from ditjax import cli
from ditjax.models.dit import (
    PAPER_PATCHES,
    PAPER_SIZES,
    gflops,
    paper_shape,
    trainable_parameters,
)
from ditjax.scaling.published import TABLE4_GFLOPS
from ditjax.tasks import cost_of, make_task


def paper_table() -> str:
    """Return a table of the 12 models of DiT Table 1 at 256x256: computed and published figures."""
    lines = [
        "Gflops are multiply-accumulates of one forward pass / 1e9, as in the paper (256x256 px).",
        f"{'model':<10} {'layers':>6} {'width':>6} {'heads':>6} {'tokens':>6} {'parameters':>12}"
        f" {'Gflops':>9} {'published':>10}",
    ]
    for name, size in PAPER_SIZES.items():
        for patch in PAPER_PATCHES:
            shape = paper_shape(size, patch)
            lines.append(
                f"{f'DiT-{name}/{patch}':<10} {size.depth:>6} {size.width:>6} {size.heads:>6}"
                f" {shape.tokens:>6} {trainable_parameters(shape):>12,} {gflops(shape):>9.3f}"
                f" {TABLE4_GFLOPS[f'DiT-{name}/{patch}']:>10.2f}"
            )
    lines.append(
        "parameters: trainable, the frozen position table excluded. published: Peebles & Xie 2023."
    )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command. Raises UserError."""
    parser = cli.parser(
        "flops", "Print parameters and Gflops of the paper's 12 models, or of --config."
    )
    if not any(word.startswith("--config") for word in argv):
        rest = parser.parse_known_args(argv)[1]
        if rest:
            cli.parse(parser, argv)  # raises the error
        print(paper_table())
        return 0
    _, config = cli.parse(parser, argv)
    cost, shape = cost_of(config), make_task(config).inputs["x0"].shape
    training = "" if cost.passes == 3 else f", {cost.passes:.4g} passes per example of training"
    print(
        f"{cost.name}, {cost.tokens} tokens of a {'x'.join(map(str, shape))} input:"
        f" {cost.parameters:,} parameters, {cost.macs / 1e6:.4g} M multiply-accumulates ="
        f" {cost.gflops:.4g} Gflops per forward pass{training}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
