"""The ``winnow`` command: one file per subcommand."""
