"""The commands of `p2r`, one module per group; `cluster.cli` lists them."""
