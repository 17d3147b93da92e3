"""The networks: Flax Linen modules. No diffusion, no mesh."""
