"""The browser studio: pages on top of the `dpo` commands. Its state is the run folders and one SQLite file."""
