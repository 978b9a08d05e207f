"""The ``hvd-ext`` command: one file a subcommand, registered in :mod:`hvd_ext.cli.main`."""
