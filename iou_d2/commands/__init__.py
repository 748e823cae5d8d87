"""The commands, each a module with `main(argv)`."""
