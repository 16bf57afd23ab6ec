"""The commands of the command line, one module each; `cli` dispatches to them."""
